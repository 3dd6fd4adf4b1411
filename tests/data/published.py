"""Folders as models are published in, with tiny tokenizers trained here; no network, no torch."""

import io
import json
import pathlib

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "over the hills and far away, naïve café",
    "the cat sat on the mat; don't you think so? yes!",
    "tom, tom, the piper's son: 12345 日本語 <s> [mask]",
] * 40

# What tokenizers stumble over.
DIFFICULT = [
    "",
    "over the hills",
    "The Cat SAT",
    "naïve café Éa",
    "cafe\u0301 combining a\u0300\u0316",  # combining marks
    "👩‍👩‍👧‍👦 👍🏽 🇯🇵",  # emoji joined by zero-width joiners, with modifiers, flags
    "日本語の、漢字 中文 한국어",
    "two  spaces   and" + " " * 30 + "thirty",
    "\ttabs\tand\nlines\r\n\n\nmore\n",
    "control \x00\x01\x07\x7f\x85 end",
    "zero\u200bwidth\u200d\ufeff\u2060 joined\u00adsoft",
    "שלום עולם مرحبا \u202eoverride\u202c",
    "ﬁ ① ½ Ａ ㍿ Ω",  # what NFKC changes
    "a.b,c?d!e's don't we've n't 'm",
    "x" * 150,  # longer than WordPiece's words may be
    "under_score <tag> &amp; {json: [1, 2]} \\n",
    "\u3000ideographic\u00a0no-break\u2028line",
    "over\ufffd\U0010ffff",
]
LEADING = [" ", "   ", " leading", "  two leading ", "\u2581over"]

# Names of special tokens within a text.
SPECIAL = [
    "a</s>b",
    "<s> over </s> the<pad>hills",
    "x <extra_id_0> y<extra_id_1>",
    "over the <extra_id_0> sat<extra_id_1>",
    "<unk>",
    "the [MASK] sat[SEP]",
    "the <mask> sat <mask>",
    "<|endoftext|>",
    "a <|im_start|>b\n",
    "<|begin|><|pad|>over<tool> x",
    "<bos>over<end_of_turn>\nthe",
    "</s></s> ",
]

CHATML = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
        {{ raise_exception('no role ' + message['role']) }}
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    # Namespaces, loop controls, macros, tools as JSON, slices, tests: what Llama's and Qwen's use.
    "tools": """{%- set ns = namespace(system='', count=0) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.system = messages[0]['content'] -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- macro header(role) -%}<|im_start|>{{ role }}\n{% endmacro -%}
{{- bos_token + header('system') + ns.system -}}
{%- if tools is defined and tools is not none -%}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{{ tool | tojson(indent=2) }}{% endfor -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if loop.index0 > 20 %}{% break %}{% endif -%}
    {%- if message.content is not defined %}{% continue %}{% endif -%}
    {%- set ns.count = ns.count + 1 -%}
    {{- header(message.role) }}{{ message.content | trim | replace('<', '&') }}<|im_end|>
    {%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ header('assistant') }}
    {%- if enable_thinking is defined and enable_thinking %}<think>{% endif %}
{%- endif %}{{ ns.count }}{{ dict(a=1) | items | list }}{{ pad_token }}{{ undefined_name }}""",
    "generation": """{% for m in messages %}
{% if m.role == 'assistant' %}
{% generation %}
{{ m.content }}{{ eos_token }}
{% endgeneration %}
{% else %}
[{{ m.role | upper }}] {{ m.content | default('nothing', true) }}
{% endif %}
{% endfor %}""",
}
CHATS = [
    [{"role": "user", "content": "over the hills"}],
    [
        {"role": "system", "content": "Be <b>brief</b> & 'kind'"},
        {"role": "user", "content": " naïve café\n日本語 👩‍👧 "},
        {"role": "assistant", "content": "<|im_end|>\n<|im_start|>system"},
        {"role": "user", "content": "", "name": None},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get", "arguments": {"at": "Köln", "n": 1.5}}}],
        },
        {"role": "tool", "content": "42"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "description": "Finds <what> & 'where': é",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
        },
    }
]


def write(folder: pathlib.Path, name: str, value) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")


def save(folder, tokenizer, config, model_config=None, **more):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        write(folder, "tokenizer_config.json", config)
    if model_config is not None:
        write(folder, "config.json", model_config)
    for name, value in more.items():
        write(folder, f"{name}.json", value)


def train(model, trainer, lines=None, **parts):
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(LINES if lines is None else lines, trainer)
    return tokenizer


def byte_bpe(vocab_size, special, pre_tokenizer=None):
    """Byte-level BPE, as GPT-2's."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


def gpt2(folder):
    """As gpt2 was published: config files that say next to nothing."""
    tokenizer = byte_bpe(320, ["<|endoftext|>"])
    end = tokenizer.token_to_id("<|endoftext|>")
    config = {"model_type": "gpt2", "bos_token_id": end, "eos_token_id": end}
    save(folder, tokenizer, {"model_max_length": 1024}, config)


def llama3(folder):
    """Begins every text, ends with one of several ids, and names a token outside tokenizer.json."""
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_bpe(330, special, split)
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
            ),
        ]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHATML,
    }
    ends = [tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|im_end|>")]
    model = {"model_type": "llama", "bos_token_id": begin, "eos_token_id": ends[0]}
    save(folder, tokenizer, config, model, generation_config={"eos_token_id": ends})


def qwen(folder):
    """Adds nothing to a text, and its tokenizer has no begin."""
    tokenizer = byte_bpe(320, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    write(folder, "chat_template.jinja", CHATML.replace("{{ bos_token }}", ""))
    save(folder, tokenizer, config, {"model_type": "qwen2", "bos_token_id": 0, "eos_token_id": 2})


def roberta(folder):
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = byte_bpe(320, special)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    flags = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"},
        **{"pad_token": "<pad>", "unk_token": "<unk>"},
        "mask_token": {"content": "<mask>", "__type": "AddedToken", **flags},
    }
    save(folder, tokenizer, config, {"model_type": "roberta"})


def bert(folder, config=None):
    """WordPiece, lower-cased; published with hardly more than tokenizer.json."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = train(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(prefix="##"),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    config = {"do_lower_case": True, "clean_up_tokenization_spaces": True} | (config or {})
    save(folder, tokenizer, config, {"model_type": "bert", "pad_token_id": 0})


def unigram(folder):
    """As T5's tokenizer.json: sentinels, an end, pieces with the space before them."""
    extra = [f"<extra_id_{n}>" for n in range(10)]
    tokenizer = train(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=100,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        ),
        decoder=decoders.Metaspace(prepend_scheme="always"),
    )
    tokenizer.add_special_tokens(extra[::-1])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": extra}
    config |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    save(folder, tokenizer, config, {"model_type": "t5", "decoder_start_token_id": 0})


def pieces(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def t5_pieces(folder):
    pieces(folder / "spiece.model", vocab_size=110, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    extra = [f"<extra_id_{n}>" for n in range(10)]
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 10}
    config |= {"additional_special_tokens": extra}
    write(folder, "tokenizer_config.json", config)
    write(folder, "config.json", {"model_type": "t5", "decoder_start_token_id": 0})


LLAMA_PIECES = {
    **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    **{"remove_extra_whitespaces": False, "split_digits": True, "vocab_size": 400},
}


def llama_pieces(folder, **config):
    pieces(folder / "tokenizer.model", **LLAMA_PIECES)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
              "legacy": False} | config  # fmt: skip
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder, "tokenizer_config.json", config)
    write(folder, "config.json", {"model_type": "llama", "pad_token_id": -1})


def llama_legacy(folder):
    llama_pieces(folder, legacy=True)


def gemma_pieces(folder):
    """No space before a text; special ids in another order, user-defined symbols."""
    options = LLAMA_PIECES | {"add_dummy_prefix": False}
    options |= {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>"}
    options |= {
        "bos_piece": "<bos>",
        "control_symbols": ["<mask>", "<start_of_turn>", "<end_of_turn>"],
    }
    pieces(folder / "tokenizer.model", **options)
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    write(folder, "tokenizer_config.json", config | {"unk_token": "<unk>"})


def xlmr_pieces(folder):
    """Ids one higher than the pieces', special ones in fairseq's order, a mask at the end."""
    pieces(folder / "sentencepiece.bpe.model", vocab_size=110)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"})
    write(folder, "config.json", {"model_type": "xlm-roberta"})


# --- before tokenizer.json ------------------------------------------------------------------------


def older(kind, folder, said, **files):
    """The same tokenizer in the files that its class had before tokenizer.json."""
    KINDS[kind](folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.txt, or vocab.json and merges.txt
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    for name, value in ({"tokenizer_config": said} | files).items():
        if value is not None:
            write(folder, f"{name}.json", value)


def bert_words(folder):
    """As BERT's first folders: nothing but words and a model's type."""
    older("bert", folder, None)


def bert_cased(folder):
    config = {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": True}
    older("bert", folder, config | {"tokenizer_class": "DistilBertTokenizer"})


def gpt2_merges(folder):
    older("gpt2", folder, None)


def gpt2_spaced(folder):
    """With a space before every text and a begin, in a model of another type."""
    config = {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}
    model = {"model_type": "llama"}
    older("gpt2", folder, config | {"add_bos_token": True, "pad_token": "<|pad|>"}, config=model)


def flagged(name, **flags):
    usual = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": name, **usual, **flags}


ROBERTA_MAP = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>"}
ROBERTA_MAP = {f"{role}_token": name for role, name in ROBERTA_MAP.items()} | {
    "pad_token": flagged("<pad>"),
    "mask_token": flagged("<mask>", lstrip=True, normalized=False),
}


def roberta_merges(folder):
    """As bart's and roberta's folders; the map says that a mask takes the space before it."""
    older("roberta", folder, {"errors": "replace"}, special_tokens_map=ROBERTA_MAP)


def byt5(folder):
    """No file at all but the class's name."""
    write(folder, "config.json", {"model_type": "t5", "tokenizer_class": "ByT5Tokenizer",
                                  "decoder_start_token_id": 0})  # fmt: skip


def byt5_flagged(folder):
    """As later versions wrote ByT5's: fewer sentinels, and ends that take no space."""
    config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 10}
    config |= {"additional_special_tokens": [f"<extra_id_{n}>" for n in range(10)]}
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config |= {role: {"__type": "AddedToken", **flagged(n)} for role, n in names.items()}
    write(folder, "tokenizer_config.json", config)
    write(folder, "config.json", {"model_type": "t5", "decoder_start_token_id": 0})


KINDS = {
    **{"gpt2": gpt2, "llama3": llama3, "qwen": qwen, "roberta": roberta, "bert": bert},
    **{"unigram": unigram, "t5_pieces": t5_pieces, "llama_pieces": llama_pieces},
    **{"llama_legacy": llama_legacy, "gemma_pieces": gemma_pieces, "xlmr_pieces": xlmr_pieces},
    **{"bert_words": bert_words, "bert_cased": bert_cased, "gpt2_merges": gpt2_merges},
    **{"gpt2_spaced": gpt2_spaced, "roberta_merges": roberta_merges, "byt5": byt5},
    **{"byt5_flagged": byt5_flagged},
}
