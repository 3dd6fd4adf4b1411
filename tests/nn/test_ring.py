"""Ring attention is attention: the same outputs and gradients, with each device holding a part."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses
from t5x_lite.errors import UserError
from t5x_lite.nn import heads, masks, online, parameters
from t5x_lite.nn.attend import attend
from t5x_lite.nn.positions import BucketBias
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.ring import ring_attend
from t5x_lite.nn.transformer import Transformer
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.step import model_apply

N, K, H, VALUE = 4, 2, 8, 6  # heads, key heads, sizes of keys and of values


@functools.cache
def ring(devices, table="dp_sp", **axes):
    axes = {"fsdp": 1, "sequence": devices, **axes}
    count = int(np.prod(list(axes.values())))
    return Sharding(MeshConfig(**axes).build(jax.devices()[:count]), table)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is attended to, and how."""

    length: int
    keys: int | None = None  # of an encoder; None: the row's own
    rows: int = 2
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    dropout: float = 0.0
    packed: bool = False
    prefix: bool = False
    biased: bool = False
    dtype: str = "float32"

    def arrays(self):
        """((q, k, v, bias), what is seen, keys of dropout, a cotangent that leaves out padding)."""
        rng, b = np.random.default_rng(0), self.rows
        t, s = self.length, self.keys or self.length

        def draw(*shape, dtype=self.dtype):
            return jnp.asarray(rng.standard_normal(shape), dtype)

        q, k, v = draw(b, t, N, H), draw(b, s, K, H), draw(b, s, K, VALUE)
        sees = masks.Visibility(
            masks.slots(t), masks.slots(s), causal=self.causal, window=self.window, slotted=True
        )
        cotangent = draw(b, t, N, VALUE)
        if self.packed:
            cuts = np.sort(rng.integers(1, t, (b, 2)))
            sees = sees.replace(
                segments_q=documents(cuts, t), segments_k=documents(cuts * s // t, s)
            )
            real = (sees.segments_q > 0) & jnp.any(sees.mask(), axis=2)
            cotangent = jnp.where(real[:, :, None, None], cotangent, 0)
        if self.prefix:
            prefix = jnp.asarray(rng.integers(2, t, (b, 1)) > np.arange(t)[None], jnp.int32)
            sees = sees.replace(prefix_q=prefix, prefix_k=prefix)
        bias = ()
        if self.biased:
            bias = (BucketBias(draw(8, N, dtype="float32"), None, 6, not self.causal),)
        keys = jax.random.split(jax.random.key(1), b) if self.dropout else None
        return (q, k, v, bias), sees, keys, cotangent

    def run(self, function, **options):
        """Outputs where they are anybody's, and gradients of q, k, v and the bias."""
        inputs, sees, keys, cotangent = self.arrays()

        @jax.jit
        def both(inputs, cotangent):
            out, back = jax.vjp(
                lambda q, k, v, bias: function(
                    q, k, v, sees, bias, scale=0.3, soft_cap=self.soft_cap, dropout=self.dropout,
                    dropout_keys=keys, **options,
                ),
                *inputs,
            )  # fmt: skip
            return jnp.where(cotangent == 0, 0, out), back(cotangent)

        return jax.tree.map(lambda x: np.asarray(x, np.float32), both(inputs, cotangent))


def documents(cuts, length):
    """Two documents and padding at the end, by row."""
    place, (first, second) = np.arange(length)[None], np.split(cuts, 2, axis=1)
    return jnp.asarray(np.where(place < first, 1, np.where(place < second, 2, 0)), jnp.int32)


def assert_equal(found, expected, tolerance=1e-5):
    """Each array's largest error over its largest value."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(b)) > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


# (devices, size of a block, case): chunks and halves of chunks that blocks divide and don't, one
# that can't be halved, windows that keep away chunks in one direction and in both.
CASES = [
    (2, 5, Case(28, dropout=0.2, biased=True)),
    (4, 3, Case(40, packed=True, dropout=0.1)),
    (8, 2, Case(48, soft_cap=2.0)),
    (4, 4, Case(36, biased=True, packed=True)),
    (4, 3, Case(40, window=6)),
    (8, 3, Case(40, window=9, causal=False, packed=True)),
    (4, 4, Case(40, window=27)),
    (4, 3, Case(40, prefix=True)),
    (8, 2, Case(40, prefix=True, window=6)),
    (4, 4, Case(40, 24, causal=False, packed=True, dropout=0.1)),
    (2, 512, Case(24, causal=False, biased=True)),
]


@pytest.mark.parametrize(("devices", "block", "case"), CASES)
def test_ring_equals_plain_attention(devices, block, case):
    found = case.run(ring_attend, sharding=ring(devices), block=block)
    assert_equal(found, case.run(attend))


MESHES = [
    ("fsdp_tp_sp", {"fsdp": 2, "tensor": 2},
     Case(28, rows=4, packed=True, dropout=0.2, biased=True)),
    ("dp_ep_sp", {"replica": 2, "expert": 2}, Case(28, rows=4, window=5, dropout=0.2)),
]  # fmt: skip


@pytest.mark.parametrize(("table", "axes", "case"), MESHES)
def test_rows_and_heads_split_as_well(table, axes, case):
    """Dropout is that of the row's key and of the head's number in the whole model."""
    found = case.run(ring_attend, sharding=ring(2, table, **axes), block=3)
    assert_equal(found, case.run(attend))


def test_ring_equals_the_attention_of_jax():
    case = Case(28, packed=True, biased=True)

    def of_jax(q, k, v, sees, bias, *, scale, **_):
        bias = bias[0].of(sees.order_q, sees.order_k)
        v = jnp.pad(v, [(0, 0)] * 3 + [(0, H - VALUE)])  # it wants heads of one size
        out = jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=sees.mask()[:, None], scale=scale
        )
        return out[..., :VALUE]

    assert_equal(case.run(ring_attend, sharding=ring(2), block=4), case.run(of_jax))


def test_bfloat16():
    case = Case(28, packed=True, biased=True, dtype="bfloat16")
    exact = dataclasses.replace(case, dtype="float32").run(attend)
    plain, found = case.run(attend), case.run(ring_attend, sharding=ring(2), block=4)
    for ours, theirs, value in zip(*map(jax.tree.leaves, (found, plain, exact)), strict=True):
        allowed = 1.5 * np.max(np.abs(theirs - value))
        assert np.max(np.abs(ours - value)) <= allowed


def test_padding_gets_zeros_and_no_gradient():
    (q, k, v, _), sees, _, _ = Case(24, packed=True).arrays()
    padding = np.asarray(sees.segments_q == 0)
    assert padding.any()
    out, back = jax.vjp(
        jax.jit(lambda *qkv: ring_attend(*qkv, sees, sharding=ring(2), scale=0.3)), q, k, v
    )
    assert not np.any(np.asarray(out)[padding])
    for gradient in back(jnp.ones_like(out)):
        assert np.all(np.isfinite(gradient))
        assert not np.any(np.asarray(gradient)[padding])


# --- the load


def blocks_computed(monkeypatch, case, devices, block, gradient):
    """How many pairs of blocks each device computes."""
    counts = collections.Counter()
    method = "pull" if gradient else "absorb"
    compute = getattr(online.Pair, method)

    def counted(pair, *args):
        device = jax.lax.axis_index("sequence")
        jax.debug.callback(lambda number: counts.update([int(number)]), device)
        return compute(pair, *args)

    monkeypatch.setattr(online.Pair, method, counted)
    case.run(ring_attend, sharding=ring(devices), block=block)
    jax.effects_barrier()
    return [counts[device] for device in range(devices)]


@pytest.mark.parametrize("gradient", [False, True])
def test_devices_share_a_causal_mask_evenly(monkeypatch, gradient):
    """4 devices have 16 blocks of 5, those of which 16 · 17 / 2 pairs see anything."""
    assert blocks_computed(monkeypatch, Case(80), 4, 5, gradient) == [34] * 4


def test_without_halves_the_last_device_would_compute_most(monkeypatch):
    """What the test above would see: 36 isn't a multiple of 8, so chunks are whole."""
    assert blocks_computed(monkeypatch, Case(36), 4, 3, False) == [6, 15, 24, 33]


def test_blocks_beyond_a_window_are_skipped(monkeypatch):
    """A device's 2 blocks see themselves and the block before: with the chunk before, 4 pairs."""
    assert blocks_computed(monkeypatch, Case(40, window=6), 4, 5, False) == [3, 4, 4, 4]


def test_other_documents_are_skipped(monkeypatch):
    """The row's two halves are two documents; each device's 2 blocks see those of two devices."""

    def halves(cuts, length):
        del cuts
        return jnp.asarray(np.where(np.arange(length) < length // 2, 1, 2)[None], jnp.int32)

    monkeypatch.setitem(globals(), "documents", halves)
    case = Case(40, packed=True, causal=False)
    assert blocks_computed(monkeypatch, case, 4, 5, False) == [8] * 4  # of 16


# --- the program


def compiled(length, devices, window=None, block=8):
    """The gradient of two layers in a loop: queries, keys and values of one array."""
    sharding = ring(devices)
    sees = masks.Visibility(masks.slots(length), masks.slots(length), window=window, slotted=True)

    def run(x_BTNH):
        def layer(x_BTNH, _):
            k_BSKH, v_BSKH = jnp.sin(x_BTNH[:, :, :K]), jnp.cos(x_BTNH[:, :, K:])
            out = ring_attend(
                x_BTNH, k_BSKH, v_BSKH, sees, sharding=sharding, scale=0.3, block=block
            )
            return out, None

        return jnp.sum(jnp.square(jax.lax.scan(layer, x_BTNH, None, length=2)[0]))

    x = jax.ShapeDtypeStruct((2, length, N, H), jnp.float32)
    split = sharding.named(("batch", "length", None, None), x.shape)
    traced = jax.jit(jax.grad(run), in_shardings=split).trace(x)
    return traced, traced.lower().compile()


def collectives(text):
    """(kind, type of its first operand) of every collective."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf"= \(?(\w+)\[[^=]*? ({kinds})(?:-start)?\(", text))


def ring_steps(jaxpr):
    """Lengths of the loops that pass arrays on."""
    found = []
    for eqn in jaxpr.eqns:
        inner = [j for j in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(j)]
        inner = [getattr(j, "jaxpr", j) for j in inner]
        if eqn.primitive.name == "scan" and any(
            inside.primitive.name == "ppermute" for j in inner for inside in j.eqns
        ):
            found.append(eqn.params["length"])
        found += [steps for j in inner for steps in ring_steps(j)]
    return found


def is_jaxpr(x):
    return hasattr(x, "eqns")


def test_keys_and_values_go_round_and_are_never_gathered():
    traced, program = compiled(128, 4)
    assert collectives(program.as_text()) == {("f32", "collective-permute")}
    assert ring_steps(traced.jaxpr) == [4, 4]  # forwards and backwards


@pytest.mark.parametrize(("window", "steps"), [(33, 2), (34, 3), (128, 4)])
def test_chunks_beyond_a_window_do_not_come(window, steps):
    """Chunks of 32: a window of 33 reaches back by 32, into one of them, whatever the query."""
    traced, _ = compiled(128, 4, window=window)
    assert ring_steps(traced.jaxpr) == [steps, steps]


def test_memory_of_a_device_falls_as_the_ring_grows():
    """It is far from that of the scores, also where layers are a loop."""
    temporaries = []
    for devices in (2, 4, 8):
        temporaries.append(compiled(512, devices)[1].memory_analysis().temp_size_in_bytes)
        scores = 2 * N * 512 * 512 * 4 / devices
        assert temporaries[-1] < 0.3 * scores
    assert temporaries[1] < 0.6 * temporaries[0]
    assert temporaries[2] < 0.6 * temporaries[1]


# --- the TPU's compiler


@pytest.mark.usefixtures("uncached")
def test_32k_tokens_compile_for_a_tpu(tpu):
    """4 heads over 4 chips: 8 MB of queries, keys and values each; the scores would be 4 GB."""
    length, heads, size = 32_768, 4, 128
    sharding = Sharding(MeshConfig(fsdp=1, sequence=4).build(tpu("v5e:2x2")), "dp_sp")
    shape = (1, length, heads, size)
    split = sharding.named(("batch", "length", "act_heads", None), shape)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)

    def run(q, k, v):
        sees = masks.Visibility(masks.slots(length), masks.slots(length), slotted=True)
        return ring_attend(q, k, v, sees, sharding=sharding, scale=size**-0.5)

    program = jax.jit(run).lower(x, x, x).compile()
    assert ("bf16", "collective-permute") in collectives(program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.mark.grid
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(("length", "limit"), [(8_192, 128), (32_768, 512)])
def test_a_llama_block_trains_on_long_rows(tpu, length, limit):
    """Temporaries in MB of one layer's gradient; of scores, 16 heads would have 64 times those."""
    sharding = Sharding(MeshConfig(fsdp=1, sequence=8).build(tpu("v5e:2x4")), "fsdp_sp")
    config = llama(
        "tiny", width=2048, layers=1, heads=16, kv_heads=8, hidden=5632, vocab_size=1024
    )  # fmt: skip
    config = dataclasses.replace(config, dtype="bfloat16")
    shapes, axes = parameters.abstract(config)
    tree = jax.tree.structure(shapes)
    leaves = zip(jax.tree.leaves(shapes), tree.flatten_up_to(axes), strict=True)
    params = tree.unflatten([
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.named(names, leaf.shape))
        for leaf, names in leaves
    ])  # fmt: skip
    where = sharding.batch((1, length))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=where)

    def loss(params, tokens):
        batch = {"tokens": tokens, "segments": tokens}
        out = Transformer(config, sharding).apply({"params": params}, batch)
        return jnp.sum(jnp.square(out.hidden_BTD.astype(jnp.float32)))

    program = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    found = collectives(program.as_text())
    assert ("bf16", "collective-permute") in found
    assert {dtype for dtype, kind in found if kind == "all-gather"} <= {"s32"}
    assert program.memory_analysis().temp_size_in_bytes < limit * 2**20


# --- models


def shallow(config):
    """One layer a stack, which is enough where all layers are alike."""
    stacks = {
        name: dataclasses.replace(stack, layers=1)
        for name in ("encoder", "decoder")
        if (stack := getattr(config, name)) is not None
    }
    return dataclasses.replace(config, **stacks)


MODELS = [
    ("t5_1_1", 2, "fsdp_tp_sp", {"fsdp": 2, "tensor": 2}, shallow),  # a bias, cross-attention
    ("gemma3", 4, "dp_sp", {}, lambda config: config),  # windows, caps
    ("deepseek_v3", 2, "tp_sp", {"tensor": 2}, shallow),  # latent attention
    pytest.param("modernbert", 4, "fsdp_sp", {"fsdp": 2}, lambda config: config,
                 marks=pytest.mark.grid),  # windows on both sides
]  # fmt: skip


@pytest.mark.parametrize(("family", "devices", "table", "axes", "change"), MODELS)
def test_models_equal_one_device(models, family, devices, table, axes, change):
    config = change(models.tiny(family, dropout=0.1))
    params, batch = models.random_params(config), models.packed_batch(config)
    noise = np.random.default_rng(2).normal(size=(*batch["tokens"].shape, config.width))
    cotangent = np.where(np.asarray(batch["segments"] > 0)[..., None], noise, 0).astype(np.float32)
    out, gradients = models.probe(config)(params, batch, models.row_keys(), cotangent)

    @jax.jit
    def run(params, batch, cotangent):
        def hidden(params):
            module = Transformer(config, ring(devices, table, **axes))
            return module.apply({"params": params}, batch, models.row_keys()).hidden_BTD

        out, back = jax.vjp(hidden, params)
        return out, back(cotangent)[0]

    split, found = run(params, batch, jnp.asarray(cotangent))
    real = cotangent != 0
    assert models.relative(np.asarray(split)[real], np.asarray(out)[real]) < 1e-5
    assert models.relative(found, gradients) < 1e-5


def classifier(pooling):
    return heads.SequenceClassifier(3, pooling=pooling, dense=heads.Dense("tanh"))


@pytest.mark.grid
@pytest.mark.parametrize(
    ("head", "loss"),
    [
        *((classifier(pooling), losses.Classification()) for pooling in ("first", "mean", "last")),
        (heads.QuestionAnswering(), losses.SpanExtraction()),
    ],
)
def test_heads_that_read_a_whole_row(models, head, loss):
    """Rows with one result: a token's vector, a mean, or a softmax over the row's tokens."""
    config = dataclasses.replace(shallow(models.tiny("bert")), head=head)
    batch = models.packed_batch(config) | {"label_weights": jnp.ones(4)}
    batch["labels"] = jnp.asarray([0, 1, 2, 1], jnp.int32)
    batch["spans"] = jnp.asarray([[1, 2], [0, 3], [2, 4], [1, 1]], jnp.int32)

    def gradient(sharding, batch):
        @jax.value_and_grad
        def run(params, batch):
            (term,) = loss(model_apply(config, sharding), params, None, batch, None).terms.values()
            return term

        return jax.jit(run)(models.random_params(config), batch)

    sharding = ring(4, "fsdp_sp", fsdp=2)
    split = {k: jax.device_put(v, sharding.batch(v.shape, k)) for k, v in batch.items()}
    assert models.relative(gradient(sharding, split), gradient(None, batch)) < 1e-5


def test_no_device_gathers_tokens(models):
    """From ids to the loss's gradients: segments travel, vectors only as keys and values."""
    config = shallow(models.tiny("gpt2"))
    params, batch = models.random_params(config), models.packed_batch(config)
    sharding = ring(4, fsdp=2)
    apply = model_apply(config, sharding)

    def loss(params, batch):
        return -jnp.sum(losses.token_logprobs(apply(params, batch), batch["tokens"]))

    batch = {k: jax.device_put(v, sharding.batch(v.shape, k)) for k, v in batch.items()}
    found = collectives(jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text())
    assert ("f32", "collective-permute") in found
    assert {dtype for dtype, kind in found if kind != "all-reduce"} == {"f32", "s32"}
    assert {dtype for dtype, kind in found if kind == "all-gather"} == {"s32"}
    assert not any(kind == "all-to-all" for _, kind in found)


# --- bad input


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(30), "length=30 doesn't divide by the ring of 4 .* try 28 or 32"),
        (Case(32, 3, causal=False), "length of the keys=3 doesn't divide by the ring of 4.* try 4"),
    ],
)
def test_lengths_that_the_ring_does_not_divide_are_refused(case, message):
    with pytest.raises(UserError, match=message):
        case.run(ring_attend, sharding=ring(4))
