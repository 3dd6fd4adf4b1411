"""What a step sends between devices, by the compilers' own account: what is named here, no more.

Left to itself the compiler gathers activations here and there, which no test of results notices.
The sizes are such that a collective's bytes, or the sizes of its axes, say what it moves.
"""

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import pytest

from t5x_lite import losses
from t5x_lite.aot.hlo import collectives
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.mixtral import mixtral
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.step import model_apply

B, T, D, N, H, F, V, L = 24, 48, 64, 4, 16, 160, 200, 3
SHAPE = {"width": D, "layers": L, "heads": N, "vocab_size": V}
FAMILIES = {
    "t5": (t5_1_1, {"head_dim": H, "hidden": F}),
    "bert": (bert, {"hidden": F}),
    "gpt2": (gpt2, {"hidden": F}),
    "llama": (llama, {"kv_heads": N, "hidden": F}),
    "mixtral": (mixtral, {"kv_heads": N, "hidden": F, "experts": 4, "top_k": 2}),
}
ATTENTION, FFN = D * N * H, D * F  # elements of each of a layer's four and three kernels
TOKENS = ("tokens", "segments", "positions", "targets", "weights")


@functools.cache
def config_of(family):
    preset, shape = FAMILIES[family]
    config = preset("tiny", **SHAPE, **shape, dropout=0.1)
    return dataclasses.replace(config, vocab_multiple=8)


@pytest.fixture
def sent(tpu, uncached):
    """`sent(where, family, table, grad, **axes)`: collectives of a loss, or of its gradient."""

    def compiled(where, family, table, grad=True, **axes):
        config, mesh = config_of(family), MeshConfig(**axes)
        devices = tpu("v5e:2x4") if where == "tpu" else jax.devices()
        sharding = Sharding(mesh.build(devices[: mesh.size]), table)
        shapes, names = parameters.abstract(config)
        params = jax.tree.map(
            lambda n, leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding.named(n, leaf.shape)
            ),
            names, shapes, is_leaf=parameters.is_axes,
        )  # fmt: skip
        sides = [f"encoder_{n}" for n in TOKENS[:3]] * (family == "t5") + [*TOKENS]
        batch = {
            name: jax.ShapeDtypeStruct(
                (B, T), "float32" if name == "weights" else "int32", sharding=sharding.batch((B, T))
            )
            for name in sides
        }
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
        apply = model_apply(config, sharding)

        def loss(params, batch, keys):
            return losses.CrossEntropy()(apply, params, None, batch, keys).terms["cross_entropy"]

        out = jax.tree.map(lambda leaf: leaf.sharding, params) if grad else None
        run = jax.jit(jax.grad(loss) if grad else loss, out_shardings=out)
        found = collectives(run.lower(params, batch, keys).compile().as_text())
        assert found
        return found, dict(sharding.mesh.shape)

    return compiled


def in_layers(found):
    return [each for each in found if each.times == L]


def itemsize(where):
    """The TPU's compiler rounds what only enters products to bfloat16, before it sends it."""
    return 2 if where == "tpu" else 4


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_fsdp_gathers_a_layer_at_a_time_and_scatters_gradients(sent, where):
    found, mesh = sent(where, "llama", "fsdp", fsdp=8)
    assert {each.axes(mesh) for each in found} == {("fsdp",)}
    size = itemsize(where)
    kernels = Counter({ATTENTION * size: 4, FFN * size: 3})
    # In each layer, each kernel once for the forward pass and once for the backward pass.
    gathers = Counter(each.bytes for each in in_layers(found) if each.kind == "all-gather")
    assert gathers == kernels + kernels
    others = [each for each in in_layers(found) if each.kind != "all-gather"]
    # XLA's CPU compiler has no reduce-scatter of its own: all gradients go to all.
    reduces = "reduce-scatter" if where == "tpu" else "all-reduce"
    layer = (4 * ATTENTION + 3 * FFN) * 4
    norms = 2 * D * 4
    assert {each.kind for each in others if each.bytes > norms} == {reduces}
    assert layer <= sum(each.bytes for each in others if each.kind == reduces) <= layer + norms
    # Outside of layers: the head's kernel, once; ids; embeddings, to where their tokens are.
    outside = [each for each in found if each.times == 1]
    assert sum(each.times for each in found) == len(outside) + L * (len(found) - len(outside))
    permitted = {
        ("all-gather", V * D * size),
        ("reduce-scatter", V * D * 4),
        ("all-gather", B * T * 4),
        ("all-to-all", B // 8 * T * D * 4),
    }
    large = {(each.kind, each.bytes) for each in outside if each.bytes > (2 * L + 1) * D * 4}
    assert large == permitted


@pytest.mark.parametrize(
    ("where", "family", "sums"),
    [
        ("cpu", "llama", {"decoder": ("attention", "ffn")}),
        ("tpu", "llama", {"decoder": ("attention", "ffn")}),
        ("cpu", "t5", {"encoder": ("attention", "ffn"),
                       "decoder": ("attention", "cross_attention", "ffn")}),
        pytest.param("cpu", "gpt2", {"decoder": ("attention", "ffn")}, marks=pytest.mark.grid),
        pytest.param("cpu", "bert", {"encoder": ("attention", "ffn")}, marks=pytest.mark.grid),
    ],
)  # fmt: skip
def test_tp_sums_once_for_attention_and_once_for_the_ffn(sent, where, family, sums):
    """And nothing but sums, in the forward pass."""
    found, mesh = sent(where, family, "tp", grad=False, fsdp=4, tensor=2)
    activation = B // 4 * T * D * 4
    assert {each.kind for each in found} == {"all-reduce"}
    layers = in_layers(found)
    assert {(each.bytes, each.axes(mesh)) for each in layers} == {(activation, ("tensor",))}
    places = [re.search(r"/(encoder|decoder)/.*/layers/(\w+)/", each.source) for each in layers]
    assert Counter(place.groups() for place in places) == Counter(
        (stack, part) for stack, parts in sums.items() for part in parts
    )
    # Outside: each side's embedding, and numbers that a softmax over a split vocabulary needs.
    outside = [shape for each in found if each.times == 1 for shape in each.shapes]
    embeddings = 2 if family == "t5" else 1
    assert outside.count(f"f32[{B // 4},{T},{D}]") == embeddings
    sizes = [math.prod(map(int, re.findall(r"\d+", shape.split("[")[1]))) for shape in outside]
    assert sorted(sizes)[-1 - embeddings] <= 3 * B // 4 * T


@pytest.mark.grid
@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_tp_sums_as_often_again_in_the_backward_pass(sent, where):
    found, mesh = sent(where, "llama", "tp", fsdp=4, tensor=2)
    assert {each.kind for each in found} == {"all-reduce"}
    activation = B // 4 * T * D * 4
    sums = [each for each in in_layers(found) if each.axes(mesh) == ("tensor",)]
    assert len(sums) == 4
    # The CPU's compiler doesn't add what comes from queries, keys and values before it sends it.
    most = 4 if where == "tpu" else 2 + 3 + 2
    assert sum(each.bytes for each in sums) == most * activation


# Gathers of float activations that are meant: an expert's device computes its group's tokens.
MEANT = {"ep": ("expert",)}
GRID = pytest.mark.grid


@pytest.mark.parametrize(
    ("family", "table", "axes"),
    [
        ("gpt2", "fsdp_tp", {"fsdp": 4, "tensor": 2}),
        ("mixtral", "fsdp_ep", {"fsdp": 4, "expert": 2}),
        pytest.param("t5", "fsdp_tp", {"fsdp": 4, "tensor": 2}, marks=GRID),
        pytest.param("bert", "fsdp_tp", {"fsdp": 4, "tensor": 2}, marks=GRID),
        pytest.param("llama", "fsdp_tp_sp", {"fsdp": 2, "tensor": 2, "sequence": 2}, marks=GRID),
        pytest.param("t5", "sp", {"fsdp": 4, "sequence": 2}, marks=GRID),
        pytest.param("gpt2", "fsdp_pp", {"fsdp": 2, "stage": 3}, marks=GRID),
        pytest.param("mixtral", "ep_tp", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=GRID),
    ],
)
def test_no_activations_and_no_logits_are_gathered(sent, family, table, axes):
    found, mesh = sent("cpu", family, table, **axes)
    meant = {axis for part, along in MEANT.items() if part in table.split("_") for axis in along}
    params = {math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters.abstract(
        config_of(family))[0])}  # fmt: skip
    for each in found:
        if each.kind != "all-gather" or {*each.axes(mesh)} <= meant:
            continue
        for shape in each.shapes:
            sizes = {int(size) for size in re.findall(r"\d+", shape.split("[")[1])}
            ids = shape.startswith("s32") and each.bytes <= B * T * 4
            assert ids or sizes.isdisjoint({T, T // 2}), (each.shapes, each.source)
        assert each.bytes <= 4 * max(params), each.source
