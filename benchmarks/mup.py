"""Learning-rate transfer, and the coordinate check, at widths 32 to 256 on a CPU.

    pip install '.[demo]'
    python benchmarks/mup.py transfer OUT     # OUT.json, OUT.png; begun again, it goes on
    python benchmarks/mup.py coordinates OUT

A two-layer Llama learns the bytes of the Python language reference (`pydoc_data.topics`, which
every Python has) from one fresh batch a step. `transfer` trains it at every width with every rate,
in the standard parametrisation and under muP with the narrowest as the base, and finds each width's
best rate from the held-out loss.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import schedules
from t5x_lite.losses import CrossEntropy
from t5x_lite.nn import parameters
from t5x_lite.nn.layers import FanIn
from t5x_lite.nn.presets.llama import llama
from t5x_lite.optim import AdamW, parametrised
from t5x_lite.train.coordinates import coordinate_check, slopes
from t5x_lite.train.plot import plot_coordinates, plot_transfer
from t5x_lite.train.state import init_state
from t5x_lite.train.step import make_eval_step, make_train_step, model_apply

WIDTHS = (32, 64, 128, 256)
RATES = tuple(2.0**power for power in range(-11, -3))
STEPS, ROWS, LENGTH, HELD_OUT = 150, 8, 32, 64
HEAD_DIM = 16
LOSS = CrossEntropy()


def model_of(width, vocab_size):
    """Heads, hidden units and the residual stream grow alike."""
    heads = width // HEAD_DIM
    model = llama(
        "tiny", width=width, layers=2, heads=heads, kv_heads=heads, hidden=3 * width,
        vocab_size=vocab_size, dtype="float32",
    )  # fmt: skip
    # Normal(0.02) is made for widths near 2,500; here every width begins well.
    return dataclasses.replace(model, init=FanIn(), vocab_multiple=8)


def corpus():
    """Ids of the text's bytes, numbered without gaps, and how many there are."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    values, ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    return ids.astype(np.int32), len(values)


def batch_at(ids, starts):
    """Rows of consecutive bytes, each to be predicted from those before it."""
    rows = jnp.asarray(ids)[starts[:, None] + jnp.arange(LENGTH + 1)[None]]
    return {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "weights": jnp.ones((len(starts), LENGTH), jnp.float32),
    }


def train_all(model, base, ids):
    """Held-out loss of every rate: all runs at once, from the same seed on the same batches."""
    # The last tenth is held out.
    bound = len(ids) * 9 // 10
    rng = np.random.default_rng(0)
    starts = jnp.asarray(rng.integers(0, bound - LENGTH, (STEPS, ROWS)))
    unseen = jnp.asarray(rng.integers(bound, len(ids) - LENGTH - 1, HELD_OUT))
    apply, axes = model_apply(model), parameters.abstract(model)[1]
    shape = schedules.linear(1.0, STEPS, warmup_steps=STEPS // 10)

    def run(rate):
        optimizer = AdamW(lambda step: rate * shape(step), weight_decay=0.0)
        transform = parametrised(optimizer, model, base).build(axes)
        step = make_train_step(apply, LOSS, transform, optimizer.schedule)

        def body(state, at):
            state, metrics = step(state, batch_at(ids, at), jax.random.key(0))
            return state, metrics["loss"]

        state, losses = jax.lax.scan(body, init_state(model, transform, 0, base=base), starts)
        total, weight = make_eval_step(apply, LOSS)(state.params, batch_at(ids, unseen))[
            "cross_entropy"
        ]
        return total / weight, losses

    held_out, losses = jax.jit(lambda rates: jax.lax.map(run, rates))(jnp.asarray(RATES))
    return np.asarray(held_out).tolist(), np.asarray(losses)[:, -10:].mean(axis=1).tolist()


def best(losses):
    """log2 of the best rate: the lowest point of a parabola through the lowest three losses."""
    known = np.where(np.isfinite(losses), losses, np.inf)
    at = int(np.argmin(known))
    powers = np.log2(RATES)
    if at in (0, len(RATES) - 1) or not np.all(np.isfinite(known[at - 1 : at + 2])):
        return float(powers[at])
    a, b, _ = np.polyfit(powers[at - 1 : at + 2], known[at - 1 : at + 2], 2)
    return float(-b / (2 * a))


def transfer(out):
    """Trains what `out`.json lacks, and draws it."""
    ids, vocab_size = corpus()
    file = Path(f"{out}.json")
    found = json.loads(file.read_text()) if file.is_file() else {}
    base = model_of(WIDTHS[0], vocab_size)
    found |= {"rates": RATES, "steps": STEPS}
    for width in WIDTHS:
        for name, of in (("standard", None), ("muP", base)):
            key = f"{name} {width}"
            if key in found:
                continue
            held_out, last = train_all(model_of(width, vocab_size), of, ids)
            found[key] = {"held_out": held_out, "training": last, "best": best(held_out)}
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(key, [round(loss, 3) for loss in held_out], round(best(held_out), 2), flush=True)
    shifts = {
        name: [found[f"{name} {w}"]["best"] - found[f"{name} {WIDTHS[0]}"]["best"] for w in WIDTHS]
        for name in ("standard", "muP")
    }
    print("best rate, log2 beside the narrowest's:", json.dumps(shifts))
    curves = {
        name: {width: found[f"{name} {width}"]["held_out"] for width in WIDTHS} for name in shifts
    }
    print(plot_transfer(RATES, curves, Path(f"{out}.png")))


def coordinates(out):
    """Coordinate checks in both parametrisations."""
    ids, vocab_size = corpus()
    models = [model_of(width, vocab_size) for width in WIDTHS]
    batch = batch_at(ids, jnp.arange(2) * 1000)
    optimizer = AdamW(lambda step: jnp.float32(0.01), weight_decay=0.0)
    rows = {
        name: coordinate_check(models, optimizer, batch, base, seeds=2)
        for name, base in (("standard", None), ("muP", models[0]))
    }
    for name, found in rows.items():
        print(name, {place: round(s, 2) for place, s in slopes(found, 4).items()})
    Path(f"{out}.json").write_text(json.dumps(rows) + "\n")
    print(plot_coordinates(rows, Path(f"{out}.png")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["transfer", "coordinates"])
    parser.add_argument("out", help="path without a suffix")
    arguments = parser.parse_args()
    {"transfer": transfer, "coordinates": coordinates}[arguments.what](arguments.out)
