"""The coordinate check: how far activations move in a few steps, at several widths.

Yang et al. 2022 (Tensor Programs V, figure 5; the check is their package's): under muP an
activation's coordinates change as much while the model widens; otherwise some change more, or less.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import losses
from t5x_lite.losses import CrossEntropy, Loss
from t5x_lite.nn import parameters
from t5x_lite.nn.attention import Attention
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.transformer import Transformer
from t5x_lite.optim import Adafactor, AdamW, parametrised
from t5x_lite.train.state import init_state
from t5x_lite.train.step import make_train_step, model_apply
from t5x_lite.types import Batch, Params

Row = dict[str, Any]  # width, seed, step, name, size, change


def coordinate_check(
    models: Sequence[ModelConfig],
    optimizer: AdamW | Adafactor,
    batch: Batch,
    base: ModelConfig | None = None,
    loss: Loss = CrossEntropy(),  # noqa: B008 - frozen
    steps: int = 4,
    seeds: int = 1,
) -> list[Row]:
    """Trains each model on one batch again and again, without dropout, and measures what moves.

    Args:
        models: one family at several widths.
        optimizer: without muP.
        batch: as the loss reads it.
        base: muP's; None: the standard parametrisation.
        loss: the training loss.
        steps: updates.
        seeds: how many initial models of each width.

    Returns:
        A row for each model, seed, number of updates and place: "decoder/0" is a layer's output,
        "decoder/0/attention" its attention's logits before rotation and mask, "logits" the head's.
        `size` is the mean of |x|, `change` that of |x - x before the first update|.
    """
    rows = []
    for model in models:
        model = dataclasses.replace(model, scan=False, remat="none", attention_kernel="plain")
        transform = parametrised(optimizer, model, base).build(parameters.abstract(model)[1])
        step = jax.jit(make_train_step(model_apply(model), loss, transform, optimizer.schedule))
        begin = jax.jit(lambda seed, m=model, t=transform: init_state(m, t, seed, base=base))
        look = jax.jit(lambda params, m=model: activations(m, params, batch))
        for seed in range(seeds):
            state = begin(jnp.uint32(seed))
            first = seen = look(state.params)
            for number in range(steps + 1):
                rows += [
                    {
                        **{"width": model.width, "seed": seed, "step": number, "name": name},
                        **{"size": _mean(x), "change": _mean(x - first[name])},
                    }
                    for name, x in seen.items()
                ]
                if number < steps:
                    state, _ = step(state, batch, jax.random.key(seed))
                    seen = look(state.params)
    return rows


def slopes(rows: Sequence[Row], step: int, measure: str = "change") -> dict[str, float]:
    """name → exponent of the width that a measure grows with, after `step` updates."""
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        by_width: dict[int, list[float]] = {}
        for row in rows:
            if (row["name"], row["step"]) == (name, step):
                by_width.setdefault(row["width"], []).append(row[measure])
        means = [np.mean(np.log(values)) for values in by_width.values()]
        found[name] = float(np.polyfit(np.log(list(by_width)), means, 1)[0])
    return found


def activations(model: ModelConfig, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Layers' outputs, attention logits and the head's logits, of an unrolled model."""
    output, variables = Transformer(model).apply(
        {"params": params}, batch, capture=True, mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module.parent, Attention),
    )  # fmt: skip
    found = {}
    for prefix, stack in (("encoder_", "encoder"), ("", "decoder" if model.decoder else "encoder")):
        outputs = output.aux.get(f"{prefix}layer_outputs_BTD")
        if outputs is not None:
            found |= {f"{stack}/{n}": x for n, x in enumerate(outputs)}
    seen = variables.get("intermediates", {})
    for path, config in _attentions(model):
        q_BTNH, k_BSKH = (_last(seen, path, name) for name in ("query", "key"))
        k_BSNH = jnp.repeat(k_BSKH, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
        found["/".join(path).replace("layers_", "")] = config.logit_scale * jnp.einsum(
            "BTNH,BSNH->BNTS", q_BTNH, k_BSNH
        )
    if output.unembedding is not None:
        logits_BTV = losses.logits(output)[..., : model.vocab_size]
        found["logits"] = logits_BTV
    elif "logits" in output.aux:
        found["logits"] = output.aux["logits"]
    return found


def _attentions(model: ModelConfig):
    """Path and config of attention with queries and keys of heads, in layers that are stacked."""
    for name in ("encoder", "decoder"):
        stack = getattr(model, name)
        for number, block in enumerate(stack.blocks if stack is not None else ()):
            for kind in ("attention", "cross_attention"):
                config = getattr(block, kind)
                if hasattr(config, "kv_heads") and len(stack.sections) == 1:
                    yield (name, f"layers_{number}", kind), config


def _last(seen, path: tuple[str, ...], name: str) -> jax.Array:
    """What a projection gave, or the norm after it."""
    for part in path:
        seen = seen[part]
    found = seen.get(f"{name}_norm", seen[name])
    return found["__call__"][0].astype(jnp.float32)


def _mean(x: jax.Array) -> float:
    return float(jnp.mean(jnp.abs(x.astype(jnp.float32))))
