"""What t5x_lite computes of a published model, in the form of the reference's outputs."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite import losses, tensors
from t5x_lite.decode.generate import Decoding, generate
from t5x_lite.decode.sampling import Sampling
from t5x_lite.hub import weights
from t5x_lite.hub.families import family_of, read_config
from t5x_lite.hub.source import Tensors, read_json
from t5x_lite.nn import parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import NoHead
from t5x_lite.nn.transformer import Transformer

ABSOLUTE, RELATIVE = 1e-4, 1e-5  # the bar


def load(folder: pathlib.Path, scan: bool = True):
    """(model, parameters, family) of a published folder."""
    config = read_json(folder / "config.json")
    family = family_of(config["model_type"])
    with Tensors(folder) as stored:
        model = read_config(config, stored.names)
        params = weights.as_tree(weights.load(model, family, stored))
    model = dataclasses.replace(model, scan=scan)
    return model, params if scan else parameters.unstack_layers(params), family


def batch_of(model: ModelConfig, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A reference batch as a model of t5x_lite takes it."""
    mask = batch["mask"]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    sides = {"tokens": batch["tokens"], "segments": mask, "positions": positions}
    if model.kind == "encoder-decoder":
        sides = {f"encoder_{name}": value for name, value in sides.items()}
        sides |= {"tokens": batch["decoder_tokens"], "segments": batch["decoder_mask"]}
    return {name: jnp.asarray(value, jnp.int32) for name, value in sides.items()}


@functools.cache
def _forward(model: ModelConfig):
    @jax.jit
    def run(params, batch):
        out = Transformer(model).apply({"params": params}, batch, capture=True)
        logits = None if out.unembedding is None else losses.logits(out)
        return out, logits

    return run


def outputs(model: ModelConfig, params, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under the names of the reference."""
    out, logits = _forward(model)(params, batch_of(model, batch))
    aux = dict(out.aux)
    result = {"layers": aux.pop("layer_outputs_BTD")[:-1]}
    if "encoder_layer_outputs_BTD" in aux:
        result["encoder_layers"] = aux.pop("encoder_layer_outputs_BTD")[:-1]
    if logits is not None:
        result["logits"] = logits[..., : model.vocab_size]
    if "pooled" in aux:
        result["pooler_output"] = aux["pooled"]
    names = ("logits", "pair_logits", "start_logits", "end_logits", "embedding")
    result |= {name: aux[name] for name in names if name in aux}
    if "reward" in aux:
        result["logits"] = aux["reward"][:, None]
    if isinstance(model.head, NoHead):
        result["last_hidden_state"] = out.hidden_BTD
    return {name: np.asarray(value) for name, value in result.items()}


def compare(ours: dict, theirs: dict, batch: dict[str, np.ndarray]) -> None:
    """Layer by layer first, so that a failure names the layer; padding is left out.

    Raises:
        AssertionError: the bar is missed; says where and by how much.
    """
    for name in sorted(theirs, key=lambda n: ("layers" not in n, n)):
        stacked = name.endswith("layers")
        ours_of = ours[name] if stacked else ours[name][None]
        theirs_of = theirs[name] if stacked else theirs[name][None]
        assert ours_of.shape == theirs_of.shape, (name, ours_of.shape, theirs_of.shape)
        mask = batch["mask"] if "decoder_mask" not in batch or name == "encoder_layers" else None
        mask = batch["decoder_mask"] if mask is None else mask
        for layer, (a, b) in enumerate(zip(ours_of, theirs_of, strict=True)):
            if a.shape[:2] == mask.shape:
                a, b = a[mask], b[mask]
            largest = np.abs(a - b).max()
            relative = np.linalg.norm(a - b) / np.linalg.norm(b)
            place = f"{name} {layer}" if stacked else name
            assert largest <= ABSOLUTE, f"{place}: largest difference {largest:.2e}"
            assert relative <= RELATIVE, f"{place}: relative difference {relative:.2e}"


def greedy(model: ModelConfig, params, batch: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Greedy continuations through the cache."""
    prompt = {"tokens": batch["tokens"], "segments": batch["mask"]}
    if model.kind == "encoder-decoder":
        prompt = {f"encoder_{name}": value for name, value in prompt.items()}
        start = np.zeros((len(batch["tokens"]), 1), np.int32)
        prompt |= {"tokens": start, "segments": np.ones_like(start)}
    prompt = {name: value.astype(np.int32) for name, value in prompt.items()}
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))
    decoding = Decoding(max_tokens=count, sampling=Sampling(temperature=0))
    return np.asarray(generate(Transformer(model), params, prompt, keys, decoding).tokens_BT)


def exported(model: ModelConfig, params, family) -> dict[str, np.ndarray]:
    """The tensors that export gives."""
    params = params if model.scan else parameters.stack_layers(params)
    return dict(weights.save(parameters.scanned(model), family, reader(params)))


def reader(params):
    """A parameter by its path."""
    leaves = tensors.flatten(params)
    return lambda path: np.asarray(leaves[path])
