"""The tokenizer of a published model, behind the one `Vocabulary` interface.

A folder holds `tokenizer.json` (read by the `tokenizers` library), a sentencepiece model, or what
older models have: `vocab.txt` or `vocab.json` with `merges.txt`, and ByT5 no file at all; where
several are there, the first of these wins. Which ids are special is taken, in this order, from
tokenizer_config.json and special_tokens_map.json, from the class's defaults, from
generation_config.json and config.json, and last from what the tokenizer itself puts around a text.

As in `transformers`, the names of special tokens within a text are read as these tokens; for text
that users write there is `encode_plain`.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.errors import UserError

JSON = "tokenizer.json"
PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
WORDS, BYTE_PAIRS, MERGES = "vocab.txt", "vocab.json", "merges.txt"
BYTES_CLASS = "ByT5Tokenizer"  # its ids are the bytes: no file holds them
# Besides the tokenizer itself, what says which ids it gives.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ROLES = ("pad", "eos", "bos", "unk", "cls", "sep", "mask")
# Names that say what they are, for a folder of tokenizer.json alone.
USUAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
Frame = tuple[tuple[int, ...], tuple[int, ...]]
SENTINEL = re.compile(r"<extra_id_(\d+)>")
RESAVE = "AutoTokenizer.from_pretrained(SRC).save_pretrained(SRC) of transformers writes it"


def tokenizer_file(folder: Path) -> Path | None:
    """The file in a folder that `load` reads, if one is there."""
    older = (WORDS, BYTE_PAIRS) if (folder / MERGES).is_file() else (WORDS,)
    for name in (JSON, *PIECES, *older):
        if (folder / name).is_file():
            return folder / name
    says = (folder / name for name in ("tokenizer_config.json", "config.json"))
    return next((f for f in says if _read_json(f).get("tokenizer_class") == BYTES_CLASS), None)


def load(folder: Path) -> "ImportedVocabulary":
    """The vocabulary of a published model's folder.

    Raises:
      UserError: no tokenizer is there, or one that can't be read exactly.
    """
    file = tokenizer_file(folder)
    if file is None:
        raise UserError(
            f"{folder} has neither {JSON} nor {', '.join((*PIECES, WORDS, MERGES))}; bind "
            f"Imported.path to the tokenizer's folder (of a converted model: its published/), or "
            f"if it has other files, {RESAVE}."
        )
    published = Published(folder)
    if file.name == JSON:
        from t5x_lite.data.json_vocabulary import JsonVocabulary, read

        return JsonVocabulary(read(file), published, (file,))
    if file.name in (WORDS, BYTE_PAIRS):
        from t5x_lite.data.older_files import load_older

        return load_older(file, published)
    if file.suffix == ".json":
        from t5x_lite.data.byt5_vocabulary import ByT5Vocabulary

        return ByT5Vocabulary(published)
    from t5x_lite.data.piece_vocabulary import PieceVocabulary

    return PieceVocabulary(file, published)


class Published:
    """What was published beside a tokenizer.

    Attributes:
      config: tokenizer_config.json.
      names: of the special tokens, by role ("eos", …).
      flags: of the special tokens, by name, where the files say more than the name.
      extra: names of special tokens without a role.
      added: flags of added tokens by id, as tokenizer_config.json or added_tokens.json has them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = self._read("tokenizer_config.json")
        tokens = self._read("special_tokens_map.json")
        # The newer form of tokenizer_config.json holds all of it; otherwise the map is later.
        newer = "added_tokens_decoder" in self.config
        merged = tokens | self.config if newer else self.config | tokens
        self._said = {role for role in ROLES if f"{role}_token" in merged}
        self.flags: dict[str, dict[str, Any]] = {}
        self.names = {
            role: self._name(merged[f"{role}_token"])
            for role in ROLES
            if merged.get(f"{role}_token")
        }
        extra: list[str] = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = merged.get(key) or ()
            extra += map(self._name, value.values() if isinstance(value, dict) else value)
        self.extra = tuple(dict.fromkeys(extra))
        self.added = self._added()
        generation = {
            k: v for k, v in self._read("generation_config.json").items() if v is not None
        }
        self._model = self._read("config.json") | generation

    def _read(self, name: str) -> dict[str, Any]:
        return _read_json(self.folder / name)

    def _name(self, token: Any) -> str:
        if not isinstance(token, dict):
            return str(token)
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        self.flags[token["content"]] = {flag: token[flag] for flag in flags if flag in token}
        return token["content"]

    def default(self, names: Mapping[str, str], flags: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes the names of a class for roles of which the files say nothing, and their flags."""
        silent = {role: name for role, name in names.items() if role not in self._said}
        self.names = silent | self.names
        self.flags = {n: dict(f) for n, f in flags.items() if n in silent.values()} | self.flags

    def _added(self) -> dict[int, dict[str, Any]]:
        listed = self.config.get("added_tokens_decoder")
        if listed is not None:
            return {int(i): dict(listed[i]) for i in sorted(listed, key=int)}
        special = {*self.names.values(), *self.extra}
        older = self._read("added_tokens.json")
        return {
            i: {"content": text, "special": text in special, "normalized": text not in special}
            for text, i in sorted(older.items(), key=lambda item: item[1])
        }

    def model_ids(self, name: str, size: int) -> tuple[int, ...]:
        """`name` of generation_config.json, else of config.json: what lies in the vocabulary."""
        value = self._model.get(name)
        many = value if isinstance(value, list) else [value]
        return tuple(i for i in many if isinstance(i, int) and 0 <= i < size)

    @property
    def model_type(self) -> str:
        """Of config.json."""
        return str(self._model.get("model_type", ""))

    @property
    def tokenizer_class(self) -> str:
        """Of tokenizer_config.json, without "Fast"; "" where it names none."""
        return str(self.config.get("tokenizer_class") or "").removesuffix("Fast")

    def added_ends(self) -> tuple[bool, bool] | None:
        """Whether begin and end are added to every text; None where nothing says so."""
        keys = ("add_bos_token", "add_eos_token")
        if not any(key in self.config for key in keys):
            return None
        begin, end = (bool(self.config.get(key)) for key in keys)
        return begin, end

    def fingerprint(self, *files: Path, kind: str = "") -> str:
        """Hash of the tokenizer's files; a chat template isn't part of it.

        `kind` is what config.json alone says of a tokenizer's class.
        """
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files) + kind.encode())
        for name in BESIDE:
            value = self._read(name)
            value.pop("chat_template", None)
            digest.update(json.dumps([name, value], sort_keys=True).encode())
        return f"imported-{digest.hexdigest()[:16]}"


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object.")
    return value


class ImportedVocabulary(Vocabulary):
    """What all kinds share: roles of the special ids.

    Attributes:
      folder: where its files lie.
    """

    folder: Path

    def _identify(
        self,
        published: Published,
        names: Mapping[str, int],
        special: Iterable[int],
        frame: Frame,
        own: Mapping[str, int],
    ) -> None:
        """Sets the special ids.

        Args:
          published: the files beside the tokenizer.
          names: every token's id.
          special: ids of the tokens that the tokenizer calls special.
          frame: what it puts before and after every text.
          own: ids that the tokenizer's own file gives the roles.
        """
        size, special, self.folder = self.size, set(special), published.folder
        ids: dict[str, int | None] = {}
        for role in ROLES:
            usual = [names[name] for name in USUAL.get(role, ()) if names.get(name) in special]
            found = [names.get(published.names.get(role, "")), own.get(role)]
            found += [*published.model_ids(f"{role}_token_id", size), *usual]
            ids[role] = next((i for i in found if i is not None), None)
        ends = published.added_ends()
        if ends is not None:
            frame = tuple(
                () if not wanted or ids[role] is None else (ids[role],)
                for wanted, role in zip(ends, ("bos", "eos"), strict=True)
            )
        self.prefix_ids, suffix = frame
        if len(self.prefix_ids) == len(suffix) == 1:
            for role, i in (("cls", self.prefix_ids[0]), ("sep", suffix[0])):
                ids[role] = i if ids[role] is None else ids[role]
        self.eos_id, self.bos_id, self.unk_id = ids["eos"], ids["bos"], ids["unk"]
        self.cls_id, self.sep_id, self.mask_id = ids["cls"], ids["sep"], ids["mask"]
        ends = published.model_ids("eos_token_id", size)
        self._stop_ids = tuple(dict.fromkeys([*super().stop_ids, *ends]))
        sentinels = {int(m[1]): i for name, i in names.items() if (m := SENTINEL.fullmatch(name))}
        count = next(n for n in range(len(sentinels) + 1) if n not in sentinels)
        self.sentinel_ids = tuple(sentinels[n] for n in range(count))
        self.start_id = next(iter(published.model_ids("decoder_start_token_id", size)), 0)
        special |= {
            i for i in (*ids.values(), *self._stop_ids, *self.sentinel_ids) if i is not None
        }
        self._special = special
        # Padding counts for nothing, whatever its id; but an id that it borrows may be a word.
        borrowed = (ids["pad"], self.eos_id, self.unk_id, self.bos_id, 0)
        self.pad_id = next(i for i in borrowed if i is not None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """As in `Vocabulary`; generation_config.json may name several."""
        return self._stop_ids

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """As in `Vocabulary`: all that the tokenizer calls special."""
        return np.array(sorted(self._special), np.int64)

    def _spoken(self, ids: Iterable[SupportsIndex]) -> list[int]:
        """The ids that give text."""
        silent = self._special - {self.unk_id}
        return [i for i in map(int, ids) if 0 <= i < self.size and i not in silent]
