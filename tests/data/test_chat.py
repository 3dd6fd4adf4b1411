"""Chat templates; tests/parity/parity_tokenizers.py compares them with transformers."""

import datetime
import importlib.util
import pathlib
import sys
import types

import pytest

from t5x_lite.data.chat import ChatTemplate
from t5x_lite.errors import UserError

spec = importlib.util.spec_from_file_location(
    "published", pathlib.Path(__file__).with_name("published.py")
)
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)
USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source).render(messages, **options)


def test_a_chat_and_the_beginning_of_an_answer():
    template = ChatTemplate(published.CHATML, {"bos_token": "<s>"})
    chat = [{"role": "system", "content": " Be brief "}, *USER]
    expected = "<s><|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert template.render(chat) == expected
    answer = template.render(chat, add_generation_prompt=True)
    assert answer == expected + "<|im_start|>assistant\n"
    assert ChatTemplate(published.CHATML).render(USER).startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Lines of blocks leave neither their indentation nor their end.
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'b': '<&é>', 'a': 1} | tojson }}", '{"b": "<&é>", "a": 1}'),
        ("{{ {'b': 2, 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": 2\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ dict(a=1) }}{{ missing }}", "{'a': 1}"),
        ("{% generation %}\nby {{ messages[0].role }}\n{% endgeneration %}\n.", "by user\n."),
        ("{{ tools }}{{ documents }}{{ add_generation_prompt }}", "NoneNoneFalse"),
        ("{{ messages[0].content.upper() }}{{ messages[0]['name'] is defined }}", "HIFalse"),
    ],
)
def test_what_templates_can_use(source, expected):
    assert render(source) == expected


def test_keys_without_a_value_are_as_good_as_none():
    source = "{{ messages[0].content is defined }}"
    assert render(source, [{"role": "user", "content": None}]) == "False"


def test_the_date_of_today():
    before, shown = datetime.date.today(), render("{{ strftime_now('%Y-%m-%d') }}")
    assert shown in (str(before), str(datetime.date.today()))


def test_tools_documents_and_whatever_else_the_template_knows():
    source = "{{ tools[0].name }} {{ documents[0].title }} {{ thinking }} {{ bos_token }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    options = {"tools": [{"name": "f"}], "documents": [{"title": "t"}], "thinking": True}
    assert template.render(USER, **options) == "f t True <s>"
    assert template.render(USER, **options, bos_token="<b>") == "f t True <b>"


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ dict.__globals__ }}",
    "{{ ('%s' | attr('format')) }}{{ '{0.__class__.__init__}'.format(messages) }}",
    "{% set m = '{0.__class__}' | attr('format') %}{{ m(messages).x.y }}{{ m.__self__ }}",
    "{% for x in messages %}{{ x | attr('__class__') | attr('__mro__') }}{% endfor %}{{ x.y.z }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}{{ lipsum.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].pop('role') }}",
    "{{ range(1000000000) | list }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_that_reaches_outside_is_refused(source):
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match="chat template, line 3: ") as caught:
        render("first\n{# second #}\n" + source, chat)
    assert "\n" not in str(caught.value)
    assert chat == USER


def test_a_template_sees_nothing_but_json():
    class Trap(str):
        def leak(self):
            return "leaked"

    with pytest.raises(UserError, match=r"line 1: .*'str object' has no attribute 'leak'"):
        render("{{ messages[0].content.leak() }}", [{"role": "user", "content": Trap("hi")}])
    with pytest.raises(UserError, match="must be JSON"):
        render("{{ messages }}", [{"role": "user", "content": types.SimpleNamespace()}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("a\n\n{% nope %}", "line 3: Encountered unknown tag 'nope'"),
        ("{{ raise_exception('roles must\nalternate') }}", "line 1: roles must alternate"),
        ("a\n{{ messages[0].x.y }}", "line 2: .* has no attribute 'x'"),
        ("a\nb{{ 1 / 0 }}", "line 2: division by zero"),
        ("a\n{% macro m(x) %}\n{{ x + 1 }}\n{% endmacro %}{{ m('') }}", "line 3: can only conc"),
        ("{% macro m() %}{{ m() }}{% endmacro %}\n{{ m() }}", "maximum recursion depth"),
    ],
)
def test_what_fails_is_told_in_one_line_with_the_templates_line(source, message):
    with pytest.raises(UserError, match=message) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def test_an_empty_chat_is_refused():
    with pytest.raises(UserError, match="no messages"):
        render("x", [])


def write_config(folder, template, **config):
    published.write(folder, "tokenizer_config.json", {"chat_template": template, **config})


def test_templates_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="no chat template 'default': it has no chat_template"):
        ChatTemplate.load(tmp_path)
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    write_config(tmp_path, "{{ bos_token }}x{{ eos_token }}{{ pad_token }}", **names)
    assert ChatTemplate.load(tmp_path).render(USER) == "<s>x</s>"
    published.write(tmp_path, "chat_template.jinja", "{{ bos_token }}file")
    assert ChatTemplate.load(tmp_path).render(USER) == "<s>file"


def test_several_templates_of_a_folder(tmp_path):
    several = [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "{{ x.y.z }}"},
    ]
    write_config(tmp_path, several)
    assert ChatTemplate.load(tmp_path).render(USER) == "d"
    with pytest.raises(UserError, match=r"tokenizer_config.json, tool_use, line 1: 'x' is undefin"):
        ChatTemplate.load(tmp_path, "tool_use").render(USER)
    with pytest.raises(UserError, match="no chat template 'rag': it has default, tool_use"):
        ChatTemplate.load(tmp_path, "rag")
    published.write(tmp_path / "additional_chat_templates", "rag.jinja", "r")
    assert ChatTemplate.load(tmp_path, "rag").render(USER) == "r"


def test_a_missing_or_old_library_is_named(monkeypatch):
    import jinja2

    with monkeypatch.context() as patch:
        patch.setattr(jinja2, "__version__", "3.1.5")
        with pytest.raises(UserError, match=r"jinja2 3\.1\.5 .* 3\.1\.6"):
            ChatTemplate("x")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"jinja2 is missing; .*t5x_lite\[hub\]"):
        ChatTemplate("x")
