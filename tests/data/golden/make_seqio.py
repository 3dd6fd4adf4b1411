"""Writes seqio.json: what seqio and t5's preprocessors give for small inputs.

    python benchmarks/data.py --setup
    .venv-seqio/bin/python tests/data/golden/make_seqio.py

Form of seqio.json, arrays as lists:

    versions      package → version
    converters    a list of cases:
        converter   EncDec, LM, PrefixLM or Encoder: seqio's `...FeatureConverter`
        arguments   its arguments: pack, and where not left out bos_id (0), mask_id,
                    loss_on_targets_only (true)
        lengths     feature → positions; PrefixLM's rows have the sum of both
        examples    [{feature: ids}]: as given; seqio first trims each feature to its length, as
                    `seqio.get_dataset` does, and drops nothing
        rows        the examples of each row, by index. seqio packs in the order given and closes a
                    row at the first example that doesn't fit
        outputs     model feature → [rows, positions]. Where a row ends before its length, seqio may
                    leave a decoder input on the first position of padding (the last target, or
                    bos_id), which nothing reads: compare decoder inputs without padding
    denoising     a list of cases: `tokens`, `mask` (1: noise), `vocab_size` and, by the name of
        t5's function, the ids that it makes of them. Sentinels count down from vocab_size - 1.
        `denoise` holds `inputs` and `targets` of t5's `denoise` by (noise_span_to_unique_sentinel,
        nonnoise_span_to_unique_sentinel) with an eos (1) after each. Where a mask begins with noise
        the two number their spans differently, and where one ends without, the targets end with a
        sentinel; T5's random spans never do either.
    span_lengths  a list of: `density`, `mean_span`, then three lists in step: `inputs_length`, and
        of `random_spans_helper` for it `tokens_length` (raw) and `targets_length`. It may count
        no span where the mask, below, has one: such inputs are a token longer than said. At a
        density of one half it takes a token off where the targets would be the longer side.
    span_counts   a list of: `density`, `mean_span`, then three lists in step: `length`, and of
        `random_spans_noise_mask` for it the tokens of `noise` and the `spans`. t5 computes them in
        float32 and rounds halves to even; the mask of one token is cut from that of two.
    rates         `examples`: task → examples of its training split
        num_examples  a list of: `maximum` (null: none), `temperature`, `scale`, `rates` (task →
                      `seqio.mixing_rate_num_examples`)
        mixtures      a list, each after those that it names: `name`, `members` ([task or mixture,
                      a number or the arguments of mixing_rate_num_examples]), `rates` (task →
                      `Mixture.get_rate`, not normalised), `total` (`Mixture.total_rate`)

Left out: an example with an empty side. seqio numbers a packed row's segments by their first
positions, so an empty `inputs` shifts the encoder's numbers against the decoder's; and PrefixLM
gives empty `targets` one target of padding.
"""

import functools
import importlib.metadata
import itertools
import json
import os
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import absl.logging
import numpy as np
import seqio
import tensorflow as tf
from t5.data import preprocessors as t5

HERE = Path(__file__).resolve().parent
PACKAGES = ("seqio", "t5", "tensorflow-cpu", "tensorflow-text", "numpy")
EOS = 1
VOCAB_SIZE = 1000

# The docstrings' own examples, then some that don't fit, fit exactly, and are trimmed.
PAIRS = [{"inputs": [7, 8, 5, 1], "targets": [3, 9, 1]}]
PAIRS += [{"inputs": [8, 4, 9, 3, 1], "targets": [4, 1]}]
ALIGNED = [{"inputs": [8, 9, 9, 3, 4, 1], "targets": [8, 7, 4, 3, 4, 1]}]
ALIGNED += [{"inputs": [8, 3, 9, 1], "targets": [8, 3, 6, 1]}]
LONG = [{"inputs": list(range(20, 32)), "targets": list(range(40, 50))}]
LONG += [{"inputs": [5, 1], "targets": [6, 1]}, {"inputs": [2], "targets": [3]}]
NO_EOS = [{"inputs": [11, 12], "targets": [21]}, {"inputs": [13], "targets": [22, 23, 24]}]

MASKS = {
    "worked": [1, 1, 0, 0, 1, 0],
    "clean first": [0, 0, 1, 1, 0, 1],
    "all noise": [1, 1, 1],
    "no noise": [0, 0, 0, 0],
    "every other": [1, 0, 1, 0, 1, 0, 1],
}

NOISES = {
    name: getattr(t5, name)
    for name in (
        "noise_span_to_unique_sentinel",
        "nonnoise_span_to_unique_sentinel",
        "noise_span_to_sentinel",
        "nonnoise_span_to_sentinel",
        "noise_token_to_sentinel",
        "drop_noise_tokens",
        "drop_nonnoise_tokens",
    )
}

# T5's own, then the three kinds of UL2 (Tay et al. 2023, table 1) and a density of one half.
SPANS = [(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0), (0.3, 1.0)]
INPUT_LENGTHS = [8, 10, 16, 31, 32, 50, 64, 100, 114, 128, 256, 500, 512, 513, 1024, 2048]
RAW_LENGTHS = [*range(1, 21), 30, 50, 64, 70, 90, 110, 130, 170, 190, 256, 512, 568, 1137]

EXAMPLES = {"tiny": 7, "small": 2_500, "middle": 392_702, "large": 4_592_289}
RATES = [
    {},
    {"maximum": 2**19},
    {"maximum": 100_000},
    {"temperature": 2.0},
    {"temperature": 8.0, "maximum": 2**21},
    {"scale": 0.25},
    {"scale": 10.0, "maximum": 2**18},
    {"scale": 0.5, "maximum": 65_536, "temperature": 4.0},
]
CAPPED = {"maximum": 2**19}
MIXTURES = {
    "fixed": [("tiny", 1.0), ("small", 3.0)],
    "proportional": [("small", CAPPED), ("middle", CAPPED), ("large", CAPPED)],
    "nested": [("fixed", 0.5), ("large", 1.5)],
    "shared": [("fixed", 2), ("proportional", 1), ("small", 0.25)],  # `small` comes three times
    "deep": [("nested", 1.0), ("shared", 1.0), ("tiny", 0.125)],
    "zero": [("tiny", 0.0), ("small", 2.0)],
}


def dataset(examples: list[dict]) -> tf.data.Dataset:
    spec = {name: tf.TensorSpec([None], tf.int32) for name in examples[0]}
    return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)


def arrays(elements) -> dict[str, np.ndarray]:
    elements = list(elements.as_numpy_iterator())
    return {name: np.stack([element[name] for element in elements]) for name in sorted(elements[0])}


def rows_of(outputs: dict, count: int) -> list[list[int]]:
    """Which examples each row holds: rows are filled in the order given."""
    name = next((name for name in outputs if name.endswith("segment_ids")), None)
    held = [int(row.max()) for row in outputs[name]] if name else [1] * count
    assert sum(held) == count, (held, count)
    starts = np.cumsum([0, *held]).tolist()
    return [list(range(a, b)) for a, b in itertools.pairwise(starts)]


def converted(name: str, lengths: dict, examples: list[dict], **arguments) -> dict:
    # seqio packs groups of as many examples as the longest side has positions
    assert len(examples) <= max(lengths.values())
    examples = [{feature: example[feature] for feature in lengths} for example in examples]
    trimmed = seqio.trim_dataset(dataset(examples), lengths, output_features=lengths)
    converter = getattr(seqio, f"{name}FeatureConverter")(**arguments)
    outputs = arrays(converter(trimmed, lengths))
    return {
        "converter": name,
        "arguments": arguments,
        "lengths": lengths,
        "examples": examples,
        "rows": rows_of(outputs, len(examples)),
        "outputs": outputs,
    }


def random_pairs(seed: int, count: int, longest: int) -> list[dict]:
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return [*rng.integers(2, 100, rng.integers(0, longest)).tolist(), EOS]

    return [{"inputs": ids(), "targets": ids()} for _ in range(count)]


def random_aligned(seed: int, count: int, longest: int) -> list[dict]:
    """Pairs as of a masked language model; 99 is the mask."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        targets = rng.integers(2, 99, rng.integers(2, longest))
        inputs = np.where(rng.random(len(targets)) < 0.3, 99, targets)
        pairs.append({"inputs": inputs.tolist(), "targets": targets.tolist()})
    return pairs


def both(inputs: int, targets: int) -> dict:
    return {"inputs": inputs, "targets": targets}


def converter_cases() -> list[dict]:
    everyone = ("EncDec", "LM", "PrefixLM")
    cases = []
    for pack, lengths, examples, converters in [
        (True, both(10, 7), PAIRS, everyone),
        (True, both(8, 5), PAIRS, ["EncDec"]),
        (True, both(8, 6), LONG, everyone),
        (True, both(4, 4), NO_EOS, ["EncDec", "PrefixLM"]),
        (True, both(20, 16), random_pairs(1, 7, 9), everyone),
        (False, both(10, 7), PAIRS, everyone),
        (False, both(8, 6), LONG, ["EncDec", "PrefixLM"]),
        (False, both(10, 4), PAIRS[:1], ["PrefixLM"]),
    ]:
        for name in converters:
            features = ["targets"] if name == "LM" else lengths
            own = {feature: lengths[feature] for feature in features}
            cases.append(converted(name, own, examples, pack=pack))
    for pack in (True, False):
        cases += [
            converted("EncDec", both(10, 7), PAIRS, pack=pack, bos_id=5),
            converted("LM", {"targets": 6}, PAIRS, pack=pack, bos_id=5),
            converted("PrefixLM", both(7, 8), PAIRS, pack=pack, loss_on_targets_only=False),
            converted("Encoder", both(11, 11), ALIGNED, pack=pack, mask_id=9),
        ]
    return [
        *cases,
        converted("PrefixLM", both(4, 3), LONG, pack=True, loss_on_targets_only=False),
        converted("Encoder", both(9, 9), ALIGNED, pack=True, mask_id=9),
        converted("Encoder", both(16, 16), random_aligned(2, 6, 12), pack=True, mask_id=99),
    ]


def denoised(tokens: list[int], mask: list[int]) -> dict:
    vocabulary = seqio.PassThroughVocabulary(VOCAB_SIZE, eos_id=EOS)
    ids, is_noise = tf.constant(tokens, tf.int32), tf.constant(mask) == 1
    made = {name: noise(ids, is_noise, vocabulary, None) for name, noise in NOISES.items()}
    features = {name: seqio.Feature(vocabulary) for name in ("inputs", "targets")}
    pair = t5.denoise(
        dataset([{"targets": tokens}]),
        features,
        noise_density=0.5,  # unused: the mask is given
        noise_mask_fn=lambda length, density, seeds: is_noise,
        inputs_fn=t5.noise_span_to_unique_sentinel,
        targets_fn=t5.nonnoise_span_to_unique_sentinel,
    )
    (pair,) = seqio.preprocessors.append_eos(pair, features).as_numpy_iterator()
    return {
        "tokens": tokens,
        "mask": mask,
        "vocab_size": VOCAB_SIZE,
        **{name: ids.numpy() for name, ids in made.items()},
        "denoise": {name: pair[name] for name in ("inputs", "targets")},
    }


def denoising_cases() -> list[dict]:
    cases = [denoised(list(range(10, 10 + len(mask))), mask) for mask in MASKS.values()]
    rng = np.random.default_rng(3)
    for length, density in ((12, 0.15), (24, 0.3), (24, 0.5)):  # independent noise
        mask = (rng.random(length) < density).astype(int).tolist()
        cases.append(denoised(rng.integers(2, 900, length).tolist(), mask))
    for length in (20, 40):  # T5's spans
        mask = t5.random_spans_noise_mask(length, 0.15, [[1, 2], [3, length]]).numpy()
        cases.append(denoised(rng.integers(2, 900, length).tolist(), mask.astype(int).tolist()))
    return cases


def span_lengths(density: float, mean_span: float) -> dict:
    made = [
        t5.random_spans_helper(
            inputs_length=length,
            noise_density=density,
            mean_noise_span_length=mean_span,
            extra_tokens_per_span_inputs=1,
            extra_tokens_per_span_targets=1,
        )
        for length in INPUT_LENGTHS
    ]
    return {
        "density": density,
        "mean_span": mean_span,
        "inputs_length": INPUT_LENGTHS,
        "tokens_length": [tokens for tokens, _ in made],
        "targets_length": [targets for _, targets in made],
    }


def span_counts(density: float, mean_span: float) -> dict:
    noise, spans = [], []
    for length in RAW_LENGTHS:
        mask = t5.random_spans_noise_mask(length, density, [[1, 2], [3, 4]], mean_span).numpy()
        noise.append(int(mask.sum()))
        spans.append(int((np.diff(mask.astype(int), prepend=0) == 1).sum()))
    about = {"density": density, "mean_span": mean_span, "length": RAW_LENGTHS}
    return about | {"noise": noise, "spans": spans}


def rate_cases() -> dict:
    def source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        raise NotImplementedError("only its size is asked for")

    features = {"targets": seqio.Feature(seqio.PassThroughVocabulary(VOCAB_SIZE))}
    for name, count in EXAMPLES.items():
        counted = seqio.FunctionDataSource(source, ["train"], num_input_examples={"train": count})
        seqio.TaskRegistry.add(name, counted, output_features=features, preprocessors=[])
    mixtures = []
    for name, members in MIXTURES.items():
        mixture = seqio.MixtureRegistry.add(
            name,
            [
                (
                    member,
                    functools.partial(seqio.mixing_rate_num_examples, **rate)
                    if isinstance(rate, dict)
                    else rate,
                )
                for member, rate in members
            ],
        )
        rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
        mixtures.append({"name": name, "members": members, "rates": rates})
        mixtures[-1]["total"] = mixture.total_rate
    tasks = {name: seqio.TaskRegistry.get(name) for name in EXAMPLES}
    defaults = {"maximum": None, "temperature": 1.0, "scale": 1.0}
    proportional = [
        defaults
        | rate
        | {"rates": {n: float(seqio.mixing_rate_num_examples(t, **rate)) for n, t in tasks.items()}}
        for rate in RATES
    ]
    return {"examples": EXAMPLES, "num_examples": proportional, "mixtures": mixtures}


def compact(value) -> str:
    plain = lambda array: array.tolist()  # noqa: E731
    return json.dumps(value, separators=(",", ":"), default=plain)


def written(report: dict) -> str:
    """A case a line, so that a changed one shows as one."""
    parts = []
    for name, value in report.items():
        if isinstance(value, list):
            parts.append(f'"{name}":[\n' + ",\n".join(map(compact, value)) + "\n]")
        else:
            parts.append(f'"{name}":{compact(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    absl.logging.set_verbosity(absl.logging.ERROR)
    report = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "converters": converter_cases(),
        "denoising": denoising_cases(),
        "span_lengths": [span_lengths(*spans) for spans in SPANS],
        "span_counts": [span_counts(*spans) for spans in SPANS],
        "rates": rate_cases(),
    }
    (HERE / "seqio.json").write_text(written(report))


if __name__ == "__main__":
    main()
