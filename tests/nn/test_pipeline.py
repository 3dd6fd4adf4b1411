"""The pipeline: what it computes, what it sends, and where the layers lie."""

import dataclasses
import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import parameters, pipeline
from t5x_lite.nn.positions import RelativeBias
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import MeshConfig, Sharding

GRID = pytest.mark.grid
ROWS = 8


def tiny(models, family, layers=4, **options):
    """The family's model with as many layers; "biased": a BERT with T5's relative positions."""
    config = models.tiny("bert" if family == "biased" else family, dropout=0.2, **options)
    name = "encoder" if config.decoder is None else "decoder"
    stack = dataclasses.replace(getattr(config, name), layers=layers)
    if family == "biased":
        stack = dataclasses.replace(stack, positions=RelativeBias(buckets=8, max_distance=8))
    return dataclasses.replace(config, **{name: stack})


def sharding(table="pp", microbatches=None, **axes):
    devices = jax.devices()[: math.prod(axes.values())]
    return Sharding(MeshConfig(**{"fsdp": 1, **axes}).build(devices), table, microbatches)


def batch_of(models, config):
    """Eight rows, two of each that `packed_batch` has, every other one with a prefix."""
    batch = {k: jnp.concatenate([v, v[::-1]]) for k, v in models.packed_batch(config).items()}
    if config.decoder is not None:
        odd = jnp.arange(ROWS)[:, None] % 2 == 1
        batch["prefix"] = ((batch["positions"] < 2) & odd).astype(jnp.int32)
    return batch


@pytest.fixture(scope="module")
def compiled(models):
    """`compiled(config, where)`: a program for (hidden, aux, gradients), and what it takes."""

    @functools.cache
    def of(config, where=None):
        batch, keys = batch_of(models, config), models.row_keys(ROWS)
        real_BT1 = (batch["segments"] > 0)[:, :, None].astype(jnp.float32)  # padding is up to paths
        noise = jax.random.normal(jax.random.key(3), (ROWS, 8, config.width)) * real_BT1

        def loss(params, batch, keys):
            out = Transformer(config, where).apply({"params": params}, batch, keys, None, True)
            hidden = out.hidden_BTD.astype(jnp.float32) * real_BT1
            return jnp.sum(hidden * noise), (hidden, out.aux)

        params = models.random_params(config)
        if where is not None:
            axes = jax.tree.leaves(parameters.abstract(config)[1], is_leaf=parameters.is_axes)
            leaves, tree = jax.tree.flatten(params)
            laid = [
                jax.device_put(leaf, where.named(names, leaf.shape))
                for leaf, names in zip(leaves, axes, strict=True)
            ]
            params = tree.unflatten(laid)
            batch = {k: jax.device_put(v, where.batch(v.shape, k)) for k, v in batch.items()}
        arguments = params, batch, keys
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments).compile()
        return step, arguments

    return of


@pytest.fixture(scope="module")
def results(compiled):
    """`results(config, where)`: hidden states, auxiliaries and gradients, run."""

    @functools.cache
    def of(config, where=None):
        step, arguments = compiled(config, where)
        (_, (hidden, aux)), gradients = step(*arguments)
        return hidden, aux, gradients

    return of


PIPELINES = [
    ("gpt2", 4, {"stage": 2}, "pp", 8),
    ("gpt2", 4, {"stage": 4}, "pp", 4),
    ("biased", 4, {"stage": 4}, "pp", 8),
    pytest.param("bert", 4, {"stage": 2}, "pp", 2, marks=GRID),
    ("mixtral", 4, {"stage": 2, "replica": 2}, "pp", 4),
    ("gemma3", 5, {"stage": 2}, "pp", 2),  # two rounds, and a layer outside of the pipeline
    pytest.param("gemma3", 9, {"stage": 4}, "pp", 8, marks=GRID),
    pytest.param("deepseek_v3", 5, {"stage": 2}, "pp", 4, marks=GRID),
    pytest.param("modernbert", 7, {"stage": 2}, "pp", 4, marks=GRID),
    pytest.param("gpt2", 4, {"stage": 2, "fsdp": 2, "tensor": 2}, "fsdp_tp_pp", 4, marks=GRID),
    pytest.param("gpt2", 4, {"stage": 2, "sequence": 2}, "sp_pp", 8, marks=GRID),
    pytest.param("bert", 4, {"stage": 2, "sequence": 2, "tensor": 2}, "tp_sp_pp", 4, marks=GRID),
    pytest.param("mixtral", 4, {"stage": 2, "expert": 2, "tensor": 2}, "ep_tp_pp", 4, marks=GRID),
    pytest.param("mixtral", 4, {"stage": 2, "expert": 2, "sequence": 2}, "ep_sp_pp", 4, marks=GRID),
]


@pytest.mark.parametrize(("family", "layers", "axes", "table", "microbatches"), PIPELINES)
def test_a_pipeline_computes_what_a_scan_does(
    models, results, family, layers, axes, table, microbatches
):
    config = tiny(models, family, layers)
    hidden, aux, gradients = results(config)
    piped, piped_aux, piped_gradients = results(config, sharding(table, microbatches, **axes))
    assert models.relative(piped, hidden) < 2e-6
    assert models.relative(piped_gradients, gradients) < 1e-5
    assert set(piped_aux) == set(aux) > set()
    for name, value in aux.items():
        assert piped_aux[name].shape == value.shape, name
        real = np.s_[:]
        if name == "layer_outputs_BTD":
            real = np.broadcast_to(np.asarray(batch_of(models, config)["segments"]) > 0,
                                   value.shape[:3])  # fmt: skip
        assert models.relative(piped_aux[name][real], value[real]) < 2e-6, name


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(p, marks=GRID) for p in ("minimal", "save_qkv_proj"))]
)
def test_a_pipeline_rematerialises(models, compiled, results, remat):
    plain, where = tiny(models, "gpt2"), sharding(microbatches=8, stage=2)
    config = dataclasses.replace(plain, remat=remat)
    assert models.relative(results(config, where)[2], results(plain)[2]) < 1e-5
    temporaries = [
        compiled(c, where)[0].memory_analysis().temp_size_in_bytes for c in (plain, config)
    ]
    assert temporaries[1] < 0.9 * temporaries[0]


def test_memory_falls_with_stages(models, compiled):
    config = tiny(models, "gpt2")
    where = [None, sharding(microbatches=8, stage=2), sharding(microbatches=4, stage=4)]
    memory = [compiled(config, each)[0].memory_analysis() for each in where]
    for of in ("argument_size_in_bytes", "temp_size_in_bytes"):
        sizes = [getattr(each, of) for each in memory]
        assert all(more > 1.2 * fewer for more, fewer in itertools.pairwise(sizes)), of


COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def test_stages_exchange_one_microbatch_at_a_time(models, compiled):
    config = tiny(models, "gpt2")
    text = compiled(config, sharding(microbatches=8, stage=2))[0].as_text()
    found = {}
    for shape, kind in COLLECTIVE.findall(text):
        sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", shape)]
        found.setdefault(kind, []).append(max(sizes, default=1))
    # A row (one microbatch) of activations goes up, and two streams of rows down: those waiting
    # for the first stage and those that the last has done; then the same for their gradients.
    assert found.pop("collective-permute") == [8 * config.width] * 6
    # Integers of the batch and keys, which every stage needs.
    assert max(found.pop("all-gather")) <= ROWS * 8
    # Gradients of what all stages hold, no layer's.
    shapes = parameters.abstract(config)[0]
    layers = jax.tree.leaves(shapes["decoder"]["layers"])
    outside = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - sum(x.size for x in layers)
    assert sum(found.pop("all-reduce")) <= outside + 1
    assert found == {}


def test_each_layer_lies_on_its_stage(models, results):
    config, where = tiny(models, "gpt2"), sharding(microbatches=4, stage=4)
    gradients = results(config, where)[2]
    for leaf in jax.tree.leaves(gradients["decoder"]["layers"]):
        stages = {shard.device.id: shard.index[0] for shard in leaf.addressable_shards}
        assert stages == {n: slice(n, n + 1, None) for n in range(4)}


def test_parameters_are_initialised_as_without(models):
    config, where = tiny(models, "gpt2"), sharding(stage=2)
    batch = parameters.smallest_batch(config, rows=2)
    piped = jax.eval_shape(Transformer(config, where).init, jax.random.key(0), batch)
    plain = jax.eval_shape(Transformer(config).init, jax.random.key(0), batch)
    assert jax.tree.structure(piped) == jax.tree.structure(plain)
    assert jax.tree.leaves(piped) == jax.tree.leaves(plain)


def test_modules_keep_their_paths(models):
    """By which rules for quantisation, and the profiler's names, find them."""
    config, found = tiny(models, "gpt2"), []

    def note(call, arguments, options, context):
        found[-1].add(context.module.path)
        return call(*arguments, **options)

    params, batch = models.random_params(config), batch_of(models, config)
    for where in (None, sharding(stage=2)):
        found.append(set())
        with nn.intercept_methods(note):
            jax.eval_shape(Transformer(config, where).apply, {"params": params}, batch)
    assert found[0] == found[1]
    assert ("decoder", "layers", "attention", "query") in found[1]


def test_how_many_microbatches():
    where = sharding(stage=2, replica=2)
    assert [pipeline.microbatches(rows, where) for rows in (4, 8, 12, 16)] == [2, 4, 2, 4]
    assert pipeline.microbatches(24, sharding(microbatches=12, stage=2)) == 12
    assert pipeline.bubble(4, 8) == 3 / 11


def test_what_is_said_at_start(models):
    config = tiny(models, "gemma3", layers=5)
    said = pipeline.check(config, sharding(stage=2), ROWS)
    assert said == "pipeline of 2 stages × 2 layers, 4 microbatches, bubble 20%"
    assert pipeline.check(config, sharding("dp", replica=2), ROWS) is None


@pytest.mark.parametrize(
    ("family", "options", "layers", "microbatches", "rows", "message"),
    [
        ("gpt2", {}, 6, None, 8, r"^6 layers don't divide by stage=4; try stage=3 or 8 layers\.$"),
        ("gemma3", {}, 6, None, 8, "^3 rounds of 2 layers don't divide by stage=4; try stage=3"),
        ("gpt2", {}, 4, 6, 8, "^pipeline_microbatches=6 must be a multiple of stage=4.*=4"),
        ("gpt2", {}, 4, 8, 12, "^12 rows .* into 8 pipeline microbatches .*; try 8 rows or"),
        ("gpt2", {}, 4, None, 6, "^6 rows .* into 4 pipeline microbatches .*; try 4 rows or"),
        ("gpt2", {"scan": False}, 4, None, 8, "^stage=4: only scanned layers"),
        ("gpt2", {"remat": "offload"}, 4, None, 8, "^stage=4: the TPU compiler can't offload"),
        ("albert", {}, 4, None, 8, "^stage=4: the 4 layers have no stacked parameters"),
        ("t5_1_1", {}, 4, None, 8, "^stage=4: an encoder-decoder can't be pipelined"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    models, family, options, layers, microbatches, rows, message
):
    config = tiny(models, family, layers, **options)
    with pytest.raises(UserError, match=message) as error:
        pipeline.check(config, sharding(microbatches=microbatches, stage=4), rows)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(
    ("table", "axes", "length"),
    [
        ("fsdp_pp", {"stage": 2, "fsdp": 2}, 128),
        pytest.param("pp", {"stage": 4}, 128, marks=GRID),
        pytest.param("tp_pp", {"stage": 2, "tensor": 2}, 512, marks=GRID),  # splash
        pytest.param("sp_pp", {"stage": 2, "sequence": 2}, 512, marks=GRID),
    ],
)
def test_the_tpu_compiler_takes_it(tpu, table, axes, length):
    config = llama(
        "tiny", width=256, layers=4, heads=2, kv_heads=2, hidden=512, vocab_size=256,
        dtype="bfloat16", remat="full",
    )  # fmt: skip
    where = Sharding(MeshConfig(**{"fsdp": 1, **axes}).build(tpu("v5e:2x2")), table, 4)
    shapes, names = parameters.abstract(config)
    leaves, tree = jax.tree.flatten(shapes)

    def laid(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    params = tree.unflatten(
        laid(leaf, where.named(axes, leaf.shape))
        for leaf, axes in zip(
            leaves, jax.tree.leaves(names, is_leaf=parameters.is_axes), strict=True
        )
    )
    tokens = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=where.batch((8, length)))
    batch = dict.fromkeys(("tokens", "segments", "positions"), tokens)

    def loss(params, batch):
        hidden = Transformer(config, where).apply({"params": params}, batch).hidden_BTD
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    text = jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()
    assert len(re.findall("collective-permute-start", text)) >= 6
    assert ("splash" in text) == (table == "tp_pp")


@GRID
def test_decoding_runs_the_stages_in_turn(models):
    config = dataclasses.replace(tiny(models, "gpt2"))
    params, batch = models.random_params(config), models.packed_batch(config)
    tokens = {"tokens": batch["tokens"]}

    def read(where):
        from t5x_lite.nn.cache import init_cache

        cache = init_cache(config, 4, 8)
        return models.forward(config, where)(params, tokens, None, cache).hidden_BTD

    assert models.relative(read(sharding(stage=2)), read(None)) < 1e-6
