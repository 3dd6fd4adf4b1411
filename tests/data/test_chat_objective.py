"""Chats: who says what. tests/parity/parity_tokenizers.py compares the masks with transformers'."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import numpy as np
import pytest

from t5x_lite.data import imported
from t5x_lite.data.chat import ChatTemplate
from t5x_lite.data.objectives import Chat
from t5x_lite.data.prepare import prepare
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes, Imported
from t5x_lite.errors import UserError
from tests.data import packed
from tests.data.packed import BOS, EOS, VOCABULARY
from tests.data.tokenised import tokenised

spec = importlib.util.spec_from_file_location(
    "published", pathlib.Path(__file__).with_name("published.py")
)
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi <s> assistant: x"},
    {"role": "assistant", "content": "good day 🙂"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]
MARKED = """{{ bos_token }}{% for m in messages %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
{% generation %}
{{ m.content }}<|im_end|>
{% endgeneration %}
{% else %}
{{ m.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
# As of models that think: what an answer began with is left out once others follow.
FORGETFUL = """{% for m in messages %}[{{ m.role }}]
{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}</s>
{% endfor %}"""


def rows_of(chats, length, objective=Chat(), vocabulary=VOCABULARY):  # noqa: B008 - frozen
    records = [{"messages": json.dumps(chat)} for chat in chats]
    store = tokenised(objective, records, vocabulary)
    return packed.rows_of(objective, store, length, vocabulary)


def of(vocabulary, row, segment=1):
    """(all the text, what is learnt) of a segment."""
    mine = row["segments"] == segment
    ids = [row["tokens"][mine][0], *row["targets"][mine]]
    assert row["tokens"][mine].tolist() == ids[:-1]
    learnt = row["targets"][mine & (row["weights"] > 0)]
    return ids, vocabulary.decode(learnt), learnt.tolist()


def test_the_format_of_our_own_learns_answers_and_their_ends():
    row = rows_of([TURNS], 128).row(0, 0)
    parts = [(f"{m['role']}: ", m["content"]) for m in TURNS]
    wanted, learnt = [BOS], []
    for head, content in parts:
        body = [*VOCABULARY.encode(content), EOS]
        wanted += VOCABULARY.encode(head) + body
        learnt += body if head == "assistant: " else []
    ids, text, ours = of(VOCABULARY, row)
    assert ids == wanted
    assert ours == learnt
    assert text == "good day 🙂see you"


@pytest.mark.parametrize("template", ["chatml", "marked"])
@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama_pieces"])
def test_a_published_template_learns_what_the_assistant_writes(tmp_path, kind, template):
    published.KINDS[kind](tmp_path)
    source = {"chatml": published.CHATML, "marked": MARKED}[template]
    (tmp_path / "chat_template.jinja").write_text(source)
    vocabulary = imported.load(tmp_path)
    row = rows_of([TURNS], 512, Chat(), vocabulary).row(0, 0)
    ids, _, learnt = of(vocabulary, row)
    assert ids == vocabulary.encode(ChatTemplate.load(tmp_path).render(TURNS))
    spoken = [f"{m['content']}<|im_end|>\n" for m in TURNS if m["role"] == "assistant"]
    assert spelt(vocabulary, learnt).replace(" ", "") == "".join(spoken).replace(" ", "")


def spelt(vocabulary, ids):
    """The text of ids, special ones by name."""
    pieces = "".join(map(vocabulary.piece, ids)).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    as_bytes = re.sub(rb"<0x(..)>", lambda m: bytes.fromhex(m[1].decode()), pieces.encode())
    return as_bytes.decode()


def test_marks_win_over_what_templates_add_to_a_prompt():
    template = ChatTemplate(MARKED)
    text, spans = template.render_answers(TURNS)
    assert text == template.render(TURNS)
    assert [text[a:b] for a, b in spans] == ["good day 🙂<|im_end|>\n", "see you<|im_end|>\n"]
    whole = ChatTemplate(published.CHATML).render_answers(TURNS)
    assert [whole[0][a:b] for a, b in whole[1]] == [text[a:b] for a, b in spans]


def test_a_template_that_rewrites_earlier_turns_must_mark_them():
    with pytest.raises(UserError, match=r"turn 3 otherwise in a longer chat.*{% generation %}"):
        ChatTemplate(FORGETFUL).render_answers(TURNS)
    text, spans = ChatTemplate(FORGETFUL).render_answers(TURNS[:3])
    assert [text[a:b] for a, b in spans] == ["[assistant]\n<think></think>good day 🙂</s>\n"]


def test_a_template_of_a_file_is_used_and_named_in_the_store(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    objective = Chat(template=str(file))
    ids, text, _ = of(VOCABULARY, rows_of([TURNS], 128, objective).row(0, 0))
    assert VOCABULARY.decode(ids) == "be brief;hi <s> assistant: x;good day 🙂;bye;see you;"
    assert text == "good day 🙂;see you;"
    before = objective.tokenizer.key(VOCABULARY)
    file.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert objective.tokenizer.key(VOCABULARY) != before
    assert Chat().tokenizer.key(VOCABULARY) == Chat(template="plain").tokenizer.key(VOCABULARY)


def test_an_imported_vocabulary_has_its_own_template_or_none(tmp_path):
    published.KINDS["llama3"](tmp_path)
    vocabulary = imported.load(tmp_path)
    assert "<|im_start|>" in vocabulary.tokenizer.get_vocab()
    own, plain = (Chat(template=t).tokenizer for t in (None, "plain"))
    assert own.key(vocabulary) != plain.key(vocabulary)
    record = {"messages": json.dumps(TURNS)}
    opening = [t.tokenize([record], vocabulary)[0][0] for t in (own, plain)]
    assert [vocabulary.decode(o).startswith("system") for o in opening] == [True, True]
    assert vocabulary.tokenizer.token_to_id("<|im_start|>") in opening[0]
    assert vocabulary.tokenizer.token_to_id("<|im_start|>") not in opening[1]


def chats(count=40, seed=0):
    rng = np.random.default_rng(seed)
    say = lambda role: {"role": role, "content": "x" * int(rng.integers(1, 12))}  # noqa: E731
    return [[say(r) for r in ["user", "assistant"] * int(rng.integers(1, 3))] for _ in range(count)]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_packing_loses_no_answer(packing):
    every = chats()
    rows = rows_of(every, 100, Chat(packing=packing))
    found = []
    for number in range(rows.count()):
        row = rows.row(0, number)
        assert not row["weights"][row["segments"] == 0].any()
        found += [of(VOCABULARY, row, n + 1)[1] for n in range(row["segments"].max())]
    said = ["".join(m["content"] for m in chat if m["role"] == "assistant") for chat in every]
    assert sorted(found) == sorted(said)
    assert rows.note == ""
    assert (rows.count() < len(every)) == (packing == "best_fit")


def test_long_chats_are_trimmed_or_left_out_and_counted():
    answer = {"role": "assistant", "content": "y" * 50}
    short = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    late = [{"role": "user", "content": "x" * 100}, answer]
    three = [short, [*short, *short, answer], late, [{"role": "user", "content": "x"}]]
    rows = rows_of(three, 48, Chat(packing="none"))
    assert rows.count() == 2
    assert rows.row(0, 1)["segments"].sum() == 48
    assert "of 4 examples 1 are longer than 48 tokens and are trimmed; 2 have" in rows.note
    dropped = rows_of(three, 48, Chat(too_long="drop", packing="none"))
    assert dropped.count() == 1
    assert "1 are longer than 48 tokens and are left out; 2 have nothing to learn" in dropped.note


def test_an_answer_just_within_the_row_is_kept():
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    first = 1 + len("user: x") + 1 + len("assistant: ")  # the id that the first target is
    assert rows_of([chat], first).row(0, 0)["weights"].sum() == 1
    with pytest.raises(UserError, match="has no examples"):
        rows_of([chat], first - 1).row(0, 0)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("{", "aren't a list"),
        ("[]", "aren't a list"),
        ('{"role": "user"}', "aren't a list"),
        ('["hi"]', "aren't a list"),
        ('[{"content": "hi"}]', "aren't a list"),
        ('[{"role": "user", "content": 7}]', "chat .*: content '7' of user isn't text"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "isn't text"),
    ],
)
def test_broken_messages_are_refused_in_one_line(messages, message):
    with pytest.raises(UserError, match=message) as caught:
        Chat().tokenizer.tokenize([{"messages": messages}], VOCABULARY)
    assert "\n" not in str(caught.value)


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    published.KINDS["llama3"](tmp_path)
    record = {"messages": json.dumps([{"role": "poet", "content": "o!"}])}
    with pytest.raises(UserError, match=r"chat .*poet.*line 3: no role poet"):
        Chat().tokenizer.tokenize([record], imported.load(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chat(packing="split"), "packing='split'"),
        (lambda: Chat(too_long="cut"), "too_long='cut'"),
        (lambda: Chat().for_family("encoder-decoder"), "encoder-decoder"),
        (lambda: Chat().sides(1), "length=1"),
        (lambda: Chat(template="nowhere").tokenizer.key(VOCABULARY), "nowhere"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("kind", ["bytes", "llama3"])
def test_a_task_is_prepared_and_read(tmp_path, quiet, kind):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats()))
    vocabulary = Bytes()
    if kind == "llama3":
        published.KINDS[kind](tmp_path)
        vocabulary = Imported(str(tmp_path))
    source, data = JsonLines(str(file)), str(tmp_path / "data")
    task = Task("chats", source, vocabulary, Chat(), data, 0.2)
    prepare(task, quiet)
    batches = task.batches(batch_size=3, length=100, seed=0)
    batch = batches[0]
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == batches.shapes
    assert batch["weights"].sum() > 0
    other = dataclasses.replace(task, objective=Chat(template="plain"))
    if kind == "bytes":
        assert other.batches(batch_size=3, length=100, seed=0)[0]["weights"].sum() > 0
    else:
        with pytest.raises(UserError, match="isn't prepared"):
            other.batches(batch_size=3, length=100, seed=0)[0]
