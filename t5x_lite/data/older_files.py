"""Imported tokenizers from before tokenizer.json: BERT's vocab.txt, GPT-2's and RoBERTa's merges.

They are built as their classes in `transformers` build them, through the `tokenizers` library.
"""

from pathlib import Path
from typing import Any

from t5x_lite.data.imported import JSON, MERGES, RESAVE, WORDS, Published
from t5x_lite.data.json_vocabulary import JsonVocabulary, tokenizers_library, unreadable
from t5x_lite.errors import UserError

BERT_NAMES = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
GPT2_NAMES = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
ROBERTA_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>"} | {
    "cls": "<s>", "mask": "<mask>"}  # fmt: skip
# The space before a mask belongs to it: the word that it hides would begin with that space.
ROBERTA_FLAGS = {"<mask>": {"lstrip": True}}
WORD_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "MobileBertTokenizer", "ElectraTokenizer")
ROBERTA_CLASSES = ("RobertaTokenizer", "BartTokenizer")
# Where tokenizer_config.json names no class, the model's type does.
CLASS_OF = {
    **{"bert": "BertTokenizer", "electra": "BertTokenizer"},
    **{"distilbert": "DistilBertTokenizer", "mobilebert": "MobileBertTokenizer"},
    **{"gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "bart": "BartTokenizer"},
}
KNOWN_OPTIONS = {"do_basic_tokenize": True, "never_split": None, "errors": "replace"}


def load_older(file: Path, published: Published) -> JsonVocabulary:
    """The vocabulary of vocab.txt, or of vocab.json and merges.txt.

    Raises:
      UserError: of a class whose tokenizer isn't known, or not to be read.
    """
    usual = "BertTokenizer" if file.name == WORDS else ""
    kind = published.tokenizer_class or CLASS_OF.get(published.model_type, usual)
    for option, value in KNOWN_OPTIONS.items():
        if published.config.get(option, value) not in (value, None):
            raise UserError(
                f"{published.folder / 'tokenizer_config.json'} has {option}="
                f"{published.config[option]!r}, which is unknown here; {JSON} is needed: {RESAVE}."
            )
    if file.name == WORDS and kind in WORD_CLASSES:
        return JsonVocabulary(_bert(file, published), published, (file,), kind)
    merges = file.with_name(MERGES)
    if file.name != WORDS and kind in ("GPT2Tokenizer", *ROBERTA_CLASSES):
        tokenizer = _byte_pairs(file, merges, published, kind in ROBERTA_CLASSES)
        return JsonVocabulary(tokenizer, published, (file, merges), kind)
    raise UserError(
        f"{file} belongs to a {kind or 'tokenizer whose class nothing names'}, which isn't known "
        f"here; {JSON} is needed: {RESAVE}."
    )


def _bert(file: Path, published: Published) -> Any:
    """WordPiece behind BERT's own rules for case, accents and Chinese characters."""
    library, config = tokenizers_library(), published.config
    published.default(BERT_NAMES, {})
    names = published.names
    with unreadable(file):
        words = library.models.WordPiece.read_file(str(file))
        tokenizer = library.Tokenizer(library.models.WordPiece(words, unk_token=names.get("unk")))
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece(prefix="##")
    _require(file, words, names, "cls", "sep", "unk")
    begin, end = names["cls"], names["sep"]
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(name, words[name]) for name in (begin, end)],
    )
    return tokenizer


def _byte_pairs(file: Path, merges: Path, published: Published, is_roberta: bool) -> Any:
    """Byte-level BPE (Radford et al. 2019); RoBERTa puts begin and end around a text."""
    library = tokenizers_library()
    published.default(*((ROBERTA_NAMES, ROBERTA_FLAGS) if is_roberta else (GPT2_NAMES, {})))
    spaced = bool(published.config.get("add_prefix_space", False))
    with unreadable(file):
        pairs = library.models.BPE.read_file(str(file), str(merges))
        tokenizer = library.Tokenizer(library.models.BPE(*pairs))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = library.decoders.ByteLevel()
    if is_roberta:
        names = published.names
        _require(file, pairs[0], names, "cls", "sep")
        end, begin = ((names[role], pairs[0][names[role]]) for role in ("sep", "cls"))
        tokenizer.post_processor = library.processors.RobertaProcessing(
            end, begin, trim_offsets=True, add_prefix_space=spaced
        )
    return tokenizer


def _require(file: Path, words: dict[str, int], names: dict[str, str], *roles: str) -> None:
    for role in roles:
        if names.get(role) not in words:
            raise UserError(
                f"{file} has no {names.get(role)!r}, the tokenizer's {role}_token; name it in "
                f"{file.with_name('tokenizer_config.json')}."
            )
