"""The `generate` verb: a run's newest good checkpoint answers prompts.

reader.py says what a prompt is to each family.
"""

import contextlib
from collections.abc import Iterator, Sequence

import jax
from rich.console import Console

from t5x_lite.data.tasks import Trainable
from t5x_lite.data.vocabularies import Vocabulary
from t5x_lite.decode import prompts as checks
from t5x_lite.decode.generate import Decoding
from t5x_lite.decode.sampling import Sampling
from t5x_lite.errors import UserError
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import MeshConfig, Rules, Sharding
from t5x_lite.serve.answers import BATCH_ROWS, Answer, continue_prompts, fill_masks, make_batch
from t5x_lite.serve.reader import Reader
from t5x_lite.serve.show import show
from t5x_lite.train.restore import restore_params

CANDIDATES = 5  # shown for each mask


def generate(
    *,
    model: ModelConfig,
    task: Trainable,
    model_dir: str,
    prompts: Sequence[str],
    max_tokens: int = 64,
    temperature: float | int = 0.8,
    top_k: int | None = None,
    top_p: float | int | None = 0.95,
    num_samples: int = 1,
    seed: int = 0,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    rules: str | Rules = "tp",
) -> list[Answer]:
    """Prints what the model in `model_dir` makes of each prompt, batch by batch.

    Args:
        model: the run's model.
        task: what it was trained on; says the vocabulary.
        model_dir: where `train` wrote.
        prompts: texts to continue, to fill or to read.
        max_tokens: the most tokens to write for a prompt.
        temperature: 0 takes the likeliest token, 1 samples as the model says.
        top_k: sample among the k likeliest tokens. An encoder-only model doesn't sample: of all
            these options it knows this one, as the number of candidates for each mask.
        top_p: sample among the likeliest tokens that together hold this probability.
        num_samples: answers to each prompt.
        seed: of the sampling. A sample depends on it, on its prompt with its number, and on its own
            number; not on the other prompts.
        step: the checkpoint of this step; None for the newest good one.
        mesh: devices along each mesh axis; None for the first device alone.
        rules: which mesh axes split what: parts of `partitioning.PARTS`, joined by "_".

    Returns:
        What was printed, as data.

    Raises:
        UserError: no checkpoint, or one of another model or vocabulary; a prompt that is empty, too
            long or without what the family needs; an option out of range.
    """
    if not prompts:
        raise UserError("no prompt; give at least one with --prompt.")
    if num_samples < 1:
        raise UserError(f"num_samples={num_samples} must be at least 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must lie between 0 and {2**32 - 1}.")
    vocabulary = task.load_vocabulary()
    reader = _reader(model, task, vocabulary)
    sampling = Sampling(temperature, top_k, top_p)
    decoding = Decoding(max_tokens, reader.stop_ids, sampling, vocabulary.pad_id)
    rows = [_read(model, reader, i, prompt, max_tokens) for i, prompt in enumerate(prompts)]
    sharding = Sharding((mesh or MeshConfig()).build(None if mesh else jax.devices()[:1]), rules)
    params, _ = restore_params(model, model_dir, step, sharding, vocabulary.fingerprint)
    module = Transformer(model, sharding)
    if model.decoder is None:
        num_samples = 1
        candidates = top_k or CANDIDATES
        answers = fill_masks(module, params, reader, rows, vocabulary, candidates)
    else:
        answers = continue_prompts(module, params, reader, rows, decoding, num_samples, seed)
    console, shown = Console(), []
    with _out_of_memory(max(map(len, rows)), max_tokens):
        for answer in answers:
            show(answer, len(prompts), num_samples, console)
            shown.append(answer)
    return shown


def _reader(model: ModelConfig, task: Trainable, vocabulary: Vocabulary) -> Reader:
    """Prompts as those of the task's objectives that the model can have learned read them."""
    objectives = [
        one.objective.for_family(model.kind)
        for one in task.tasks()
        if model.kind in one.objective.families
    ]
    return Reader(
        model,
        vocabulary,
        corrupts_spans=any(objective.corrupts_spans for objective in objectives),
        reads_sentinels=any(objective.reads_sentinels for objective in objectives),
        reads_prefix=any(objective.reads_prefix for objective in objectives),
    )


@contextlib.contextmanager
def _out_of_memory(longest: int, max_tokens: int) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"not enough memory for up to {BATCH_ROWS} rows of {longest} + {max_tokens} tokens; "
            "lower max_tokens, give fewer or shorter prompts, or a mesh of more devices."
        ) from error


def _read(
    model: ModelConfig, reader: Reader, number: int, prompt: str, max_tokens: int
) -> list[int]:
    """A prompt's ids, if the model can take them and `max_tokens` more."""
    try:
        _require_text(prompt)
        row = reader.encode(prompt)
        batch = make_batch(model, [row], start_id=reader.start_id)
        checks.check(model, batch, max_tokens if model.decoder else 1)
    except UserError as error:
        shown = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
        raise UserError(f"prompt {number + 1} ({shown!r}): {error}") from error
    return row


def _require_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start + 1} isn't valid UTF-8.") from error
