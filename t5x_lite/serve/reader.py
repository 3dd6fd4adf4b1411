"""Text to what a model of each family reads, and what it writes back to text.

Decoder-only: a prompt is continued. It may be empty: then a document is made up from its start. Of
a task that has sentinels, `<extra_id_0>`, … in it are these; a prefix LM fills them if it was
trained to (see the next one), while to fill in the middle a prompt has them in the task's order:
`<extra_id_0>before<extra_id_1>after<extra_id_2>`.

Encoder-decoder: a prompt is the encoder's input. `<extra_id_0>`, `<extra_id_1>`, … in it are
sentinels, which a model trained by span corruption fills: `Thank you<extra_id_0> me`. For such a
task a prompt without any is given one at its end, so that it is continued.

Encoder-only: each `<mask>` in a prompt, or the vocabulary's own name of it, is a masked token.

An imported vocabulary says itself what a text begins with, and several ids may end one.

Sentencepiece's words carry the space before them, so spaces before a mark are left out: what fills
it brings its own.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_lite.data.byt5_vocabulary import ByT5Vocabulary
from t5x_lite.data.vocabularies import ByteVocabulary, Vocabulary
from t5x_lite.errors import UserError
from t5x_lite.nn.config import ModelConfig

MASK = "<mask>"
SENTINEL = "<extra_id_0>"
_SENTINELS = re.compile(r"<extra_id_(\d+)>")
_NEEDED = {"encoder-only": ("cls_id", "sep_id", "mask_id"), "encoder-decoder": ("eos_id",)}

Segments = tuple[tuple[str, bool], ...]  # parts of a text, and whether the model wrote them


class Reader:
    """Encodes prompts for a model of one family, and decodes what it answers.

    Args:
        model: the model.
        vocabulary: the task's.
        corrupts_spans: whether the model learned to fill sentinels, and little else.
        reads_sentinels: whether a decoder learned what they stand for. An encoder's may anyway.
        reads_prefix: whether a decoder sees its prompt in both directions.

    Raises:
        UserError: the vocabulary is larger than the model's, or lacks an id that the family needs.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocabulary: Vocabulary,
        corrupts_spans: bool = False,
        reads_sentinels: bool = False,
        reads_prefix: bool = False,
    ):
        if vocabulary.size > model.vocab_size:
            raise UserError(
                f"the vocabulary has {vocabulary.size} ids and the model {model.vocab_size}; "
                f"give the task that it was trained on, or set vocab_size to {vocabulary.size}."
            )
        vocabulary.require(*_NEEDED.get(model.kind, ()))
        self._model, self._vocabulary = model, vocabulary
        self.reads_prefix = reads_prefix and model.kind == "decoder-only"
        self._has_marks = model.kind != "decoder-only" or reads_sentinels
        self._fills = model.kind == "encoder-decoder" or (reads_sentinels and self.reads_prefix)
        self._adds_sentinel = corrupts_spans and self._fills
        self.stop_ids, self.start_id = vocabulary.stop_ids, vocabulary.start_id
        self._prefix = vocabulary.prefix_ids
        if self._prefix is None:
            begins = model.kind == "decoder-only" and vocabulary.bos_id is not None
            self._prefix = (vocabulary.bos_id,) if begins else ()
        self._marks = _SENTINELS
        if model.kind == "encoder-only":
            names = {MASK, vocabulary.piece(vocabulary.mask_id)}
            self._marks = re.compile("|".join(map(re.escape, sorted(names))))

    def banned(self) -> np.ndarray:
        """[physical V], True for ids that no answer holds: beyond the vocabulary, and special."""
        vocabulary = self._vocabulary
        banned = np.arange(self._model.physical_vocab) >= vocabulary.size
        banned[vocabulary.special_ids] = True
        if self._model.kind != "encoder-only":
            banned[list(self.stop_ids)] = False
        if self._fills:
            banned[list(vocabulary.sentinel_ids)] = False
        return banned

    def encode(self, prompt: str) -> list[int]:
        """Ids that the model reads.

        Raises:
            UserError: a prompt that is empty, or lacks what the family needs.
        """
        kind, vocabulary = self._model.kind, self._vocabulary
        if kind == "decoder-only":
            prompt = self._with_sentinel(prompt)
            encode = self._encode_marked if self._has_marks else vocabulary.encode
            ids = [*self._prefix, *encode(prompt)]
            if not ids and vocabulary.bos_id is None:
                raise UserError("it is empty, and the vocabulary has no bos_id to begin with.")
            return ids or [vocabulary.bos_id]
        if not prompt.strip():
            raise UserError(f"it is empty; an {kind} model needs a text to read.")
        if kind == "encoder-only":
            if not self._marks.search(prompt):
                raise UserError(f"it has no {MASK}; an encoder-only model fills masks.")
            return [vocabulary.cls_id, *self._encode_marked(prompt), vocabulary.sep_id]
        marked = self._encode_marked(self._with_sentinel(prompt))
        return [*self._prefix, *marked, vocabulary.eos_id]

    def _with_sentinel(self, prompt: str) -> str:
        """The prompt, with one at its end where it has none and the model fills nothing else."""
        adds = self._adds_sentinel and not self._marks.search(prompt)
        return prompt + SENTINEL if adds else prompt

    def _encode_marked(self, prompt: str) -> list[int]:
        ids, start = [], 0
        for mark in self._marks.finditer(prompt):
            text = prompt[start : mark.start()]
            if not isinstance(self._vocabulary, ByteVocabulary | ByT5Vocabulary):
                text = text.rstrip(" ")
            ids += [*self._vocabulary.encode(text), self._marked_id(mark)]
            start = mark.end()
        return ids + self._vocabulary.encode(prompt[start:])

    def _marked_id(self, mark: re.Match) -> int:
        if self._model.kind == "encoder-only":
            return self._vocabulary.mask_id
        sentinels = self._vocabulary.sentinel_ids
        if int(mark[1]) >= len(sentinels):
            raise UserError(f"it has {mark[0]}, but the vocabulary {len(sentinels)} sentinels, "
                            "counted from 0.")  # fmt: skip
        return sentinels[int(mark[1])]

    def answer(self, read: Sequence[int], written: Sequence[int]) -> Segments:
        """The text that a prompt and the model's tokens make together.

        Sentinels of the prompt are replaced by what the model wrote for them, if anything.
        """
        written = [i for i in written if i not in self.stop_ids]
        has_sentinels = any(i in self._vocabulary.sentinel_ids for i in read)
        if self._model.kind == "decoder-only" and not (self._fills and has_sentinels):
            # One by one, sentinels are shown where they stand.
            given = [[i] for i in read] if has_sentinels else [read]
            return self._segments([*((run, False) for run in given), (written, True)])
        if not has_sentinels:
            return self._segments([(written, True)])
        spans = _spans(written, set(self._vocabulary.sentinel_ids))
        return self.replace(read, {n: spans[i] for n, i in enumerate(read) if i in spans})

    def replace(self, read: Sequence[int], new: Mapping[int, Sequence[int]]) -> Segments:
        """The prompt's text with others instead of some of its ids, {place: ids}."""
        return self._segments([(new.get(n, [i]), n in new) for n, i in enumerate(read)])

    def _segments(self, runs: Sequence[tuple[Sequence[int], bool]]) -> Segments:
        """Text of runs of ids: slices of the text of all ids at once.

        A piece's text may depend on those before it: some vocabularies drop the first one's space,
        and a character's bytes may be several pieces. A sentinel that nothing replaced is shown.
        """
        vocabulary = self._vocabulary
        whole = vocabulary.decode([i for run, _ in runs for i in run])
        segments: list[tuple[str, bool]] = []
        ids: list[int] = []
        start = 0
        for run, is_new in runs:
            ids += run
            end = len(vocabulary.decode(ids))
            shown = whole[start:end] + "".join(
                vocabulary.piece(i) for i in run if i in vocabulary.sentinel_ids and not is_new
            )
            start = end
            if segments and segments[-1][1] == is_new:
                shown = segments.pop()[0] + shown
            segments.append((shown, is_new))
        return (*segments[:-1], (segments[-1][0] + whole[start:], segments[-1][1]))


def _spans(written: Sequence[int], sentinels: set[int]) -> dict[int, list[int]]:
    """What stands behind each sentinel that the model wrote; of equals the first counts."""
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in written:
        if token in sentinels:
            span = []
            spans.setdefault(token, span)
        else:
            span.append(token)
    return spans
