"""Prompts as ids to answers as text, in batches of few shapes."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode.fill_mask import fill_mask
from t5x_lite.decode.generate import Decoding, generate
from t5x_lite.decode.prompts import right_pad
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.transformer import Transformer
from t5x_lite.serve.reader import Reader, Segments
from t5x_lite.types import KeyArray, Params

BATCH_ROWS = 16  # the most rows that are decoded together
SHORTEST = 16  # what shorter prompts are padded to
START = 0  # a decoder's first token where an encoder reads the prompt; training has the same


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model made of one prompt.

    Attributes:
        prompt: its number, from 0.
        sample: which of the prompt's answers it is, from 0.
        segments: the text in parts, each with whether the model wrote it.
        tokens: how many tokens the model wrote, the end of the text included.
        stopped: whether it came to the end of the text, rather than to max_tokens.
        logprob: sum of the tokens' log-probabilities under the model, in nats.
        candidates: for each mask, the likeliest pieces and their probabilities, best first.
    """

    prompt: int
    sample: int
    segments: Segments
    tokens: int = 0
    stopped: bool = False
    logprob: float = 0.0
    candidates: tuple[tuple[tuple[str, float], ...], ...] = ()

    @property
    def text(self) -> str:
        """The prompt together with what the model wrote."""
        return "".join(text for text, _ in self.segments)


def make_batch(
    config: ModelConfig,
    rows: Sequence[Sequence[int]],
    length: int | None = None,
    start_id: int = START,
    is_prefix: bool = False,
) -> dict[str, np.ndarray]:
    """Prompts as the model takes them: an encoder-decoder's decoder begins with the start id.

    `is_prefix`: a decoder alone was trained to see its prompt in both directions.
    """
    if config.kind == "encoder-decoder":
        return right_pad(rows, length, "encoder_") | right_pad([[start_id]] * len(rows))
    batch = right_pad(rows, length)
    return batch | {"prefix": batch["segments"]} if is_prefix else batch


def continue_prompts(
    model: Transformer,
    params: Params,
    reader: Reader,
    rows: Sequence[Sequence[int]],
    decoding: Decoding,
    samples: int,
    seed: int,
) -> Iterator[Answer]:
    """`samples` answers to each prompt, in order; one program for all batches.

    A sample's key is folded from the seed, its prompt's number and its own.
    """
    numbers = [(i, j) for i in range(len(rows)) for j in range(samples)]
    banned_V = jnp.asarray(reader.banned())
    for part in _batches(model, len(numbers)):
        read = [rows[numbers[n][0]] for n in part]
        batch = make_batch(model.config, read, _length(rows), reader.start_id, reader.reads_prefix)
        keys_B = _keys(seed, [numbers[n] for n in part])
        result = generate(model, params, batch, keys_B, decoding, banned_V)
        result = jax.tree.map(np.asarray, result)
        for place, n in enumerate(dict.fromkeys(part.tolist())):
            prompt, sample = numbers[n]
            length = int(result.lengths_B[place])
            yield Answer(
                prompt,
                sample,
                reader.answer(rows[prompt], result.tokens_BT[place, :length].tolist()),
                tokens=length,
                stopped=bool(result.stopped_B[place]),
                logprob=float(result.logprobs_BT[place].sum()),
            )


def fill_masks(
    model: Transformer,
    params: Params,
    reader: Reader,
    rows: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    candidates: int,
) -> Iterator[Answer]:
    """Each prompt with the likeliest piece in place of each mask, and the other candidates."""
    banned_V = jnp.asarray(reader.banned())
    for part in _batches(model, len(rows)):
        batch = make_batch(model.config, [rows[n] for n in part], _length(rows))
        result = fill_mask(model, params, batch, vocabulary.mask_id, candidates, banned_V)
        result = jax.tree.map(np.asarray, result)
        for place, n in enumerate(dict.fromkeys(part.tolist())):
            masks = [m for m, where in enumerate(result.positions_BM[place]) if where >= 0]
            ids_MK, logprobs_MK = result.ids_BMK[place, masks], result.logprobs_BMK[place, masks]
            places = result.positions_BM[place, masks].tolist()
            best = {where: [int(ids_K[0])] for where, ids_K in zip(places, ids_MK, strict=True)}
            yield Answer(
                n,
                0,
                reader.replace(rows[n], best),
                tokens=len(masks),
                logprob=float(logprobs_MK[:, 0].sum()),
                candidates=tuple(
                    tuple(
                        (vocabulary.piece(i), float(np.exp(score)))
                        for i, score in zip(ids_K, logprobs_K, strict=True)
                    )
                    for ids_K, logprobs_K in zip(ids_MK, logprobs_MK, strict=True)
                ),
            )


def _batches(model: Transformer, total: int) -> Iterator[np.ndarray]:
    """Numbers of the rows of each batch. All have one size; what is missing repeats the last row.

    The size is a power of two that the mesh's data axes divide.
    """
    size = min(_bucket(total), BATCH_ROWS)
    if model.sharding is not None:
        parts = model.sharding.mesh.shape["replica"] * model.sharding.mesh.shape["fsdp"]
        size = -(-size // parts) * parts
    for start in range(0, total, size):
        yield np.minimum(np.arange(start, start + size), total - 1)


def _length(rows: Sequence[Sequence[int]]) -> int:
    return max(SHORTEST, _bucket(max(map(len, rows))))


def _bucket(number: int) -> int:
    """The next power of two, so that a few programs serve all sizes."""
    return 1 << (number - 1).bit_length()


def _keys(seed: int, numbers: Sequence[tuple[int, int]]) -> KeyArray:
    key, fold = jax.random.key(seed), jax.random.fold_in
    return jnp.stack([fold(fold(key, prompt), sample) for prompt, sample in numbers])
