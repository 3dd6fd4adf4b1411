"""A published model's chat template: messages in, the text that the model was trained on out.

Templates are Jinja programs written by strangers. They run in Jinja's immutable sandbox, see
nothing but JSON, and get only the functions and filters that `transformers` gives them.
"""

import datetime
import functools
import json
import re
import secrets
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.data.imported import Published
from t5x_lite.errors import UserError

FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
# Before it, templates could leave the sandbox (CVE-2025-27516).
JINJA = (3, 1, 6)
PLACE = "chat template"  # what tracebacks call its code
MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Variables that the marks write, before and after; undefined ones write nothing.
BEGINS, ENDS = "generation_begins", "generation_ends"
Span = tuple[int, int]


class ChatTemplate:
    """A compiled template.

    Args:
      source: the template.
      variables: what it sees besides the messages: names of the special tokens ("bos_token", …).
      place: where it comes from, for messages.

    Raises:
      UserError: it isn't a template.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, place: str = PLACE):
        self.source, self._place = source, place
        self._variables = dict(variables or {})
        jinja2 = _jinja()
        try:
            code = _environment().compile(source, filename=PLACE)
            self._template = jinja2.Template.from_code(
                _environment(), code, _environment().make_globals(None)
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{place}, line {error.lineno}: {_line(error)}") from error

    @classmethod
    def load(cls, folder: Path, name: str = "default") -> "ChatTemplate":
        """The template of a published model's folder.

        Args:
          folder: with chat_template.jinja, or tokenizer_config.json's chat_template.
          name: of several templates, such as "tool_use" or "rag".

        Raises:
          UserError: no such template there, or none that can be read.
        """
        published = Published(folder)
        found = _sources(folder, published.config.get("chat_template"))
        if name not in found:
            there = f"it has {', '.join(found)}" if found else f"it has no {FILE}"
            raise UserError(
                f"{folder} has no chat template {name!r}: {there}; a model that wasn't trained on "
                "chats is prompted with text."
            )
        place, source = found[name]
        return cls(source, _token_names(published), place)

    @classmethod
    def find(cls, folder: Path) -> "ChatTemplate | None":
        """The default template of a published model's folder, if it has one."""
        found = _sources(folder, Published(folder).config.get("chat_template"))
        return cls.load(folder) if "default" in found else None

    @classmethod
    def read(cls, file: Path, folder: Path | None = None) -> "ChatTemplate":
        """The template of a file, with the special tokens of a published model's folder."""
        names = {} if folder is None else _token_names(Published(folder))
        return cls(_read(file), names, str(file))

    @property
    def key(self) -> str:
        """All that decides what it writes."""
        return json.dumps([self.source, self._variables], sort_keys=True)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The chat as the model reads it; `Vocabulary.encode` gives its ids, with no begin added.

        Args:
          messages: each with a "role" and mostly a "content".
          add_generation_prompt: whether to end with what an answer begins with.
          tools: JSON schemas of functions.
          documents: to answer from.
          **variables: whatever else the template knows, such as enable_thinking.

        Raises:
          UserError: no messages, ones that aren't JSON, or that the template refuses; a template
            that fails or reaches outside the sandbox. One line, with the template's line.
        """
        given = {"tools": tools, "documents": documents, **variables}
        return self._render(messages, {**given, "add_generation_prompt": add_generation_prompt})

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        if not messages:
            raise UserError("no messages; a chat needs at least one.")
        # A key without a value is as good as none: many templates would write "None".
        chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
        given = {**self._variables, **variables}
        try:
            seen = json.loads(json.dumps({"messages": chat, **given}))
        except (TypeError, ValueError) as error:
            raise UserError(f"messages and variables must be JSON: {error}.") from error
        try:
            return self._template.render(**seen)
        except Exception as error:  # a program by a stranger may raise anything
            where = f", line {_line_of(error)}" if _line_of(error) else ""
            raise UserError(f"{self._place}{where}: {_line(error)}") from error

    def render_answers(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        """The chat, and the characters begin..end-1 of each answer: what a model is to learn.

        Answers are what the template marks by `{% generation %}`; without any mark, what each turn
        of the assistant adds to the prompt for it.

        Raises:
          UserError: as `render`; no mark, and earlier turns are written otherwise when later ones
            follow.
        """
        if MARKED.search(self.source):
            return self._split_at_marks(messages)
        text, spans = self.render(messages), []
        for place, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            # Many templates refuse a chat of no message.
            prompt = self.render(messages[:place], add_generation_prompt=True) if place else ""
            turn = self.render(messages[: place + 1])
            if not (turn.startswith(prompt) and text.startswith(turn)):
                raise UserError(
                    f"{self._place} writes turn {place + 1} otherwise in a longer chat, so its "
                    f"answers can't be told; mark them in it by {{% generation %}}."
                )
            spans.append((len(prompt), len(turn)))
        return text, spans

    def _split_at_marks(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        # Nobody can write what nobody knows.
        marks = {BEGINS: f"\ue000{secrets.token_hex(8)}", ENDS: f"\ue001{secrets.token_hex(8)}"}
        variables = {"tools": None, "documents": None, "add_generation_prompt": False}
        marked = self._render(messages, {**variables, **marks})
        text, spans = "", []
        for n, part in enumerate(re.split("|".join(marks.values()), marked)):
            if n % 2:
                spans.append((len(text), len(text) + len(part)))
            text += part
        return text, spans


def _token_names(published: Published) -> dict[str, str]:
    return {f"{role}_token": token for role, token in published.names.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error


def _sources(folder: Path, listed: Any) -> dict[str, tuple[str, str]]:
    """(place, source) of each template by name; files win over tokenizer_config.json."""
    place = str(folder / "tokenizer_config.json")
    if isinstance(listed, list):
        found = {one["name"]: (f"{place}, {one['name']}", one["template"]) for one in listed}
    else:
        found = {} if listed is None else {"default": (place, listed)}
    files = {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).is_file():
        files["default"] = folder / FILE
    return found | {name: (str(path), _read(path)) for name, path in files.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _line_of(error: Exception) -> int | None:
    """The template's innermost line of a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == PLACE), None)


def _jinja() -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise UserError("jinja2 is missing; install it: pip install 't5x_lite[hub]'.") from error
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit())
    if version < JINJA:
        raise UserError(
            f"jinja2 {jinja2.__version__} has known ways out of its sandbox; install 3.1.6 or "
            "later: pip install -U jinja2."
        )
    return jinja2


@functools.cache
def _environment() -> Any:
    """What a template can use; the names are those that published templates rely on."""
    jinja2 = _jinja()

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks what the model writes."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's form

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begins, ends = (
                jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line)
                for name in (BEGINS, ENDS)
            )
            return [begins, jinja2.nodes.Scope(body, lineno=line), ends]

    class Namespace(jinja2.utils.Namespace):
        """Jinja's, without names that lead to Python's insides."""

        def __init__(*args, **values):
            for name in dict(*args[1:], **values):
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(*args, **values)

        def __setitem__(self, name, value):
            _refuse_private(name)
            super().__setitem__(name, value)

    def _refuse_private(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def make_dict(*args: Any, **values: Any) -> dict:
        return dict(*args, **values)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> None:
            # Jinja's own gives an undefined value, which prints as nothing.
            raise jinja2.exceptions.SecurityError(
                f"{attribute!r} of {type(obj).__name__!r} is outside of the sandbox"
            )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": Namespace,
        "dict": make_dict,
    }
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: unlike Jinja's own it escapes no HTML and keeps the order of keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
