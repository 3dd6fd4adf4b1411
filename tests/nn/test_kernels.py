"""Every path of attention gives what the whole score matrix gives, gradients too."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.flops import matmul_flops
from t5x_lite.nn import attend, kernels, masks, parameters, scores
from t5x_lite.nn.blockwise import blockwise_attend
from t5x_lite.nn.cache import init_cache
from t5x_lite.nn.cudnn import cudnn_attend
from t5x_lite.nn.kernels import Work, choose
from t5x_lite.nn.positions import BucketBias
from t5x_lite.nn.sliced import sliced_attend
from t5x_lite.nn.splash import splash_attend
from t5x_lite.partitioning import MeshConfig, Sharding

ROWS, LENGTH, HEADS = 2, 200, 4
KEYS = jax.random.split(jax.random.key(7), ROWS)


def segments(length=LENGTH, packed=True):
    """Two documents and padding, and one document; or one document, and one before padding."""
    third = length // 3
    two = [1] * third + [2] * (length - third - 7) + [0] * 7
    one = [1] * (length - 30) + [0] * 30
    return jnp.asarray([two if packed else one, [1] * length], jnp.int32)


def sees(queries=LENGTH, keys=LENGTH, packed=None, prefix=False, **how):
    """Who sees whom in slots 0, 1, …; `packed`: as in `segments`."""
    if packed is not None:
        ids = segments(queries, packed)
        how |= {"segments_q": ids, "segments_k": ids}
    if prefix:
        front = (masks.slots(queries) % 70 < 40).astype(jnp.int32)
        how |= {"prefix_q": front, "prefix_k": front}
    return masks.Visibility(masks.slots(queries), masks.slots(keys), slotted=True, **how)


def table(heads=HEADS):
    return BucketBias(
        jnp.asarray(np.random.default_rng(5).normal(size=(8, heads)), jnp.float32), max_distance=50
    )


def arrays(queries, keys, kv_heads=2, head_dim=16, value_dim=16, heads=HEADS, rows=ROWS):
    """Queries, keys, values and the cotangent of outputs."""
    rng = np.random.default_rng(0)
    shapes = (queries, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, value_dim)
    return [
        jnp.asarray(rng.normal(size=(rows, *shape)), jnp.float32)
        for shape in (*shapes, (queries, heads, value_dim))
    ]


def results(run, visible, bias, given):
    """(outputs, gradients of q, k, v and bias), where queries see anything."""
    q, k, v, cotangent = given
    real = jnp.ones(q.shape[:2]) if visible.segments_q is None else visible.segments_q > 0
    real = real.astype(jnp.float32)[:, :, None, None]

    def loss(q, k, v, bias):
        out = run(q, k, v, visible, bias)
        return jnp.sum(out * cotangent * real), out * real

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, out), gradients = gradient(q, k, v, bias)
    return out, gradients


def apart(run, visible, bias=(), given=None, **form):
    """The largest difference from the plain path over the largest value, of each array."""
    given = given or arrays(visible.order_q.shape[1], visible.order_k.shape[1])
    plain = functools.partial(attend.attend, kernel="plain", scale=0.3, **form)
    expected = results(plain, visible, bias, given)
    found = results(functools.partial(run, scale=0.3, **form), visible, bias, given)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs]


def blockwise(q, k, v, visible, bias, **form):
    return blockwise_attend(q, k, v, visible, bias, block=70, **form)


def sliced(q, k, v, visible, bias, **form):
    return sliced_attend(q, k, v, visible, bias, size=70, **form)


def splash(q, k, v, visible, bias, **form):
    assert not bias
    return splash_attend(q, k, v, visible, block=128, interpret=True, **form)


def fused(q, k, v, visible, bias, **form):
    assert not bias
    return cudnn_attend(q, k, v, visible, implementation="xla", **form)


# 200 slots are 3 blocks of 67, 3 slices of 70, 70 and 60, or 2 blocks of 128 with 56 of padding.
CAUSAL, ENCODER = sees(packed=True), sees(packed=False, causal=False)
LOCAL, AROUND = sees(packed=True, window=30), sees(packed=True, causal=False, window=30)
CROSS = masks.everything(LENGTH, 160, segments_q=segments(), segments_k=segments(160))
LATENT = arrays(LENGTH, LENGTH, kv_heads=4, head_dim=24, value_dim=16)


@pytest.mark.parametrize("run", [blockwise, sliced])
@pytest.mark.parametrize(
    ("visible", "bias", "form"),
    [
        (sees(), (), {}),
        (LOCAL, (), {"soft_cap": 2.0}),
        (ENCODER, (table(),), {"dropout": 0.3, "dropout_keys": KEYS}),
        (sees(packed=True, prefix=True, window=90), (table(), table()), {"soft_cap": 2.0,
         "dropout": 0.3, "dropout_keys": KEYS}),
        (CROSS, (), {"dropout": 0.3, "dropout_keys": KEYS}),
    ],
    ids=["causal", "local", "encoder", "everything at once", "cross"],
)  # fmt: skip
def test_blocks_of_scores_give_what_the_matrix_gives(run, visible, bias, form):
    found = apart(run, visible, bias, **form)
    assert max(found[:4]) < 2e-6
    # Each number of a table's gradient is a sum of up to 80,000, in another order.
    assert max(found[4:], default=0) < 1e-5


@pytest.mark.parametrize(
    ("visible", "given", "form"),
    [
        (sees(), LATENT, {}),
        (LOCAL, None, {"soft_cap": 2.0}),
        (AROUND, None, {}),
        (CROSS, None, {}),
        (sees(causal=False), None, {}),
    ],
    ids=["causal, latent", "local", "around", "cross", "encoder"],
)
def test_splash_gives_what_the_matrix_gives(visible, given, form):
    assert max(apart(splash, visible, given=given, **form)) < 2e-6


WHAT_CUDNN_IS_GIVEN = pytest.mark.parametrize(
    ("visible", "given"),
    [
        (sees(), LATENT),
        (LOCAL, None),
        (sees(packed=False, window=30), None),
        (AROUND, None),
        (ENCODER, None),
        (CROSS, None),
        (sees(packed=True, prefix=True), None),
    ],
    ids=["causal, latent", "local", "padded", "around", "encoder", "cross", "prefix"],
)


@WHAT_CUDNN_IS_GIVEN
def test_the_call_of_cudnn_gives_what_the_matrix_gives(visible, given):
    assert max(apart(fused, visible, given=given)) < 2e-6


ON_A_GPU = jax.default_backend() == "gpu"


def cudnn(q, k, v, visible, bias, **form):
    """In bfloat16, which is what cuDNN takes; on a CPU XLA stands in for it."""
    assert not bias
    form |= {"implementation": "cudnn" if ON_A_GPU else "xla"}
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    return cudnn_attend(q, k, v, visible, **form).astype(jnp.float32)


@pytest.mark.gpu
@WHAT_CUDNN_IS_GIVEN
def test_cudnn_gives_what_the_matrix_gives(visible, given):
    # Numbers that bfloat16 has, so that what is apart is cuDNN's own rounding.
    given = [
        x.astype(jnp.bfloat16).astype(jnp.float32)
        for x in given or arrays(LENGTH, visible.order_k.shape[1])
    ]
    # JAX's own way to attend multiplies bfloat16 by float32.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        found = apart(cudnn, visible, given=given)
    assert max(found) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_GPU, reason="asks a GPU's compiler: T5X_LITE_TEST_PLATFORM=cuda")
@pytest.mark.parametrize("length", [128, 256])
def test_long_rows_compile_to_cudnn(length):
    visible = sees(length, length)
    given = [x.astype(jnp.bfloat16) for x in arrays(length, length)[:3]]

    def loss(q, k, v):
        out = attend.attend(q, k, v, visible, scale=0.3, kernel="auto")
        return jnp.sum(out.astype(jnp.float32))

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()
    assert ("__cudnn$fmha" in program.as_text()) == (length >= 256)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (sees(), [{"is_causal": True}]),
        (sees(window=30), [{"is_causal": True, "local_window_size": (29, 0)}]),
        (sees(causal=False), [{}]),
        (sees(causal=False, window=30), [{"mask": (1, 1, LENGTH, LENGTH)}]),
        (
            CAUSAL,
            [
                {"is_causal": True, "mask": (ROWS, 1, LENGTH, LENGTH)},
                {"is_causal": True, "query_seq_lengths": (ROWS,),
                 "key_value_seq_lengths": (ROWS,)},
            ],
        ),
    ],
)  # fmt: skip
def test_what_cudnn_is_asked(visible, expected, monkeypatch):
    asked = []

    def record(q, k, v, **given):
        given = {name: getattr(value, "shape", value) for name, value in given.items()}
        asked.append({name: value for name, value in given.items() if value not in (None, False)})
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    q, k, v, _ = arrays(LENGTH, LENGTH)
    jax.eval_shape(lambda *a: cudnn_attend(*a, visible, scale=0.3), q, k, v)
    asked.sort(key=lambda call: "query_seq_lengths" in call)
    assert asked == [{"scale": 0.3, "implementation": "cudnn", **call} for call in expected]


@pytest.mark.parametrize(
    ("visible", "pairs"),
    [
        (sees(), 70 * 70 + 70 * 140 + 60 * 200),
        (sees(prefix=True), 200 * 200),
        # Each query sees 29 keys before it, and an encoder's 29 after it.
        (sees(window=30), 70 * 70 + 70 * 99 + 60 * 89),
        (sees(causal=False, window=30), 70 * 99 + 70 * 128 + 60 * 89),
    ],
)
def test_a_slice_has_the_keys_that_it_may_see_and_no_more(visible, pairs):
    q, k, v, _ = arrays(LENGTH, LENGTH)
    found = matmul_flops(lambda *a: sliced(*a, visible, (), scale=0.3), q, k, v)
    assert found == 2 * ROWS * HEADS * pairs * (q.shape[3] + v.shape[3])


def test_a_query_that_sees_nothing_stays_finite_in_blocks():
    hidden = sees(segments_q=0 * segments(), segments_k=0 * segments())
    q, k, v, _ = arrays(LENGTH, LENGTH)
    for run in (blockwise, sliced, splash):
        value, gradient = jax.jit(
            jax.value_and_grad(lambda q, run=run: jnp.sum(run(q, k, v, hidden, (), scale=0.3)))
        )(q)
        assert np.isfinite(value), run
        assert np.all(np.isfinite(gradient)), run


# Whole models.


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3"])
def test_a_model_computes_the_same_by_blocks_with_dropout(models, family):
    config = models.tiny(family, dropout=0.3)
    params, batch = models.random_params(config), models.packed_batch(config)
    plain, blocks = (
        models.forward(dataclasses.replace(config, attention_kernel=kernel))(
            params, batch, models.row_keys()
        ).hidden_BTD
        for kernel in ("plain", "blockwise")
    )
    real = np.asarray(batch["segments"]) > 0
    assert models.relative(np.asarray(blocks)[real], np.asarray(plain)[real]) < 2e-6


@pytest.mark.parametrize("family", ["t5_1_1", pytest.param("umt5", marks=pytest.mark.grid)])
def test_biases_learn_the_same_by_blocks_with_dropout(models, family):
    config = models.tiny(family, dropout=0.3)
    params, batch = models.random_params(config), models.packed_batch(config)
    noise = jax.random.normal(jax.random.key(3), (4, 8, config.width))
    noise *= (batch["segments"] > 0).astype(jnp.float32)[:, :, None]
    (_, plain), (_, blocks) = (
        models.probe(dataclasses.replace(config, attention_kernel=kernel))(
            params, batch, models.row_keys(), noise
        )
        for kernel in ("plain", "blockwise")
    )
    assert models.relative(blocks, plain) < 1e-5
    tables = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(blocks)
        if "positions" in jax.tree_util.keystr(path)
    ]
    assert all(jnp.any(table) for table in tables)
    assert len(tables) == 2


@pytest.mark.parametrize("family", ["gemma3", pytest.param("deepseek_v3", marks=pytest.mark.grid)])
def test_a_model_asks_splash_for_what_it_means(models, family, monkeypatch):
    config = models.tiny(family)
    params, batch = models.random_params(config), models.packed_batch(config)
    plain = models.forward(config)(params, batch).hidden_BTD
    interpreted = functools.partial(splash_attend, interpret=True)
    monkeypatch.setattr(attend.splash, "splash_attend", interpreted)
    monkeypatch.setattr(kernels, "platform_of", lambda sharding: "tpu")
    config = dataclasses.replace(config, attention_kernel="splash")
    run = models.forward.__wrapped__(config)  # other tests must not find this program
    found = run(params, batch).hidden_BTD
    real = np.asarray(batch["segments"]) > 0
    assert models.relative(np.asarray(found)[real], np.asarray(plain)[real]) < 2e-6
    assert not np.array_equal(found, plain)


def test_rows_and_heads_on_eight_devices():
    sharding = Sharding(MeshConfig(fsdp=4, tensor=2).build(), "fsdp_tp")
    rows, keys = 4, jax.random.split(jax.random.key(7), 4)
    ids = jnp.concatenate([segments(), segments(packed=False)])
    visible = sees(segments_q=ids, segments_k=ids)
    given = arrays(LENGTH, LENGTH, rows=rows)
    dropped = {"dropout": 0.3, "dropout_keys": keys}
    for run in (blockwise, sliced):
        mapped = functools.partial(run, sharding=sharding)
        *found, of_table = apart(mapped, visible, (table(),), given, **dropped)
        assert max(found) < 2e-6
        assert of_table < 1e-5  # a sum of many, as above
    assert max(apart(functools.partial(splash, sharding=sharding), visible, (), given)) < 2e-6


def test_decoding_and_initialisation_need_no_kernel(models):
    config = models.tiny("gemma3")
    params, batch = models.random_params(config), models.packed_batch(config)
    on_tpu = dataclasses.replace(config, attention_kernel="splash")
    shapes, _ = parameters.abstract(on_tpu)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    cache = init_cache(on_tpu, 4, 8)
    cached = models.forward(on_tpu)(params, batch, None, cache).hidden_BTD
    assert models.relative(cached, models.forward(config)(params, batch).hidden_BTD) < 1e-5
    with pytest.raises(UserError, match="'splash' runs on a TPU, and this program is compiled for"):
        models.forward(on_tpu)(params, batch)


# Memory.


def largest(jaxpr) -> int:
    """Elements of the largest array that a program makes anywhere."""
    inner = [
        largest(getattr(sub, "jaxpr", sub))
        for equation in jaxpr.eqns
        for sub in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        )
        if hasattr(getattr(sub, "jaxpr", sub), "eqns")
    ]
    made = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    return max(inner + made, default=0)


@pytest.mark.parametrize("kernel", ["blockwise", "plain"])
def test_no_program_of_blocks_holds_the_scores(kernel):
    length, heads = 4096, 2
    visible = sees(length, length, segments_q=jnp.ones((1, length), jnp.int32),
                   segments_k=jnp.ones((1, length), jnp.int32), prefix=True)  # fmt: skip
    form = {"scale": 0.3, "soft_cap": 2.0, "dropout": 0.1, "dropout_keys": KEYS[:1]}

    def loss(q, k, v, bias):
        return jnp.sum(attend.attend(q, k, v, visible, bias, kernel=kernel, **form))

    q, k, v, _ = arrays(length, length, heads=heads, rows=1)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, k, v, (table(heads),))
    program = traced.lower().compile()
    matrix = heads * length**2
    temporary = program.memory_analysis().temp_size_in_bytes
    if kernel == "plain":  # the measures measure
        assert largest(traced.jaxpr.jaxpr) >= matrix
        assert "4096,4096]" in program.as_text()
        assert temporary > 4 * matrix
    else:
        assert largest(traced.jaxpr.jaxpr) < matrix / 16
        assert "4096,4096]" not in program.as_text()
        assert temporary < 4 * matrix / 8


@pytest.mark.usefixtures("uncached")
def test_the_tpu_compiler_takes_splash(tpu):
    sharding = Sharding(MeshConfig(fsdp=2, tensor=2).build(tpu("v5e:2x2")), "fsdp_tp")
    length, heads = 1000, 8

    def loss(q, k, v, ids):
        visible = sees(length, length, segments_q=ids, segments_k=ids, window=300)
        out = attend.attend(
            q, k, v, visible, scale=0.125, soft_cap=50.0, sharding=sharding, kernel="auto"
        )
        return jnp.sum(out.astype(jnp.float32))

    def given(*shape, dtype=jnp.bfloat16):
        names = ("batch", "length", "act_heads", "head_dim")[: len(shape)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(names, shape))

    q, k = (given(4, length, number, 64) for number in (heads, 2))
    program = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        .trace(q, k, k, given(4, length, dtype=jnp.int32))
        .lower(lowering_platforms=("tpu",))
        .compile()
    )
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
    # The loss alone is summed over devices: no one needs another's rows or heads.
    assert "all-gather(" not in text
    assert "all-to-all(" not in text
    scores_of_a_device = 4 * (4 // 2) * (heads // 2) * length**2
    assert program.memory_analysis().temp_size_in_bytes < scores_of_a_device / 4


# Dropout.


def words(rows=3, heads=4, queries=64):
    keys = jax.random.split(jax.random.key(1), rows)
    return scores.query_keys(keys, jnp.arange(heads), jnp.arange(queries))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_fair_and_independent(rate):
    drawn = np.asarray(scores.kept(words(), jnp.arange(512), rate), np.float64)
    count, sigma = drawn.size, math.sqrt(rate * (1 - rate))
    assert abs(drawn.mean() - (1 - rate)) < 4 * sigma / math.sqrt(count)
    centred = (drawn - (1 - rate)) / sigma
    # No row, head, query or key is favoured: means over all others are as binomial ones are.
    for axis in range(4):
        others = tuple(a for a in range(4) if a != axis)
        means = centred.mean(axis=others) * math.sqrt(count / drawn.shape[axis])
        assert np.abs(means).max() < 5, axis
        # Neighbours along the axis don't go together.
        pairs = np.take(centred, range(1, drawn.shape[axis]), axis) * np.take(
            centred, range(drawn.shape[axis] - 1), axis
        )
        assert abs(pairs.mean()) < 5 / math.sqrt(pairs.size), axis
    # Nor do the patterns of any two queries, whatever they are apart by.
    patterns = centred.reshape(-1, 512)[:256]
    together = patterns @ patterns.T / math.sqrt(512)
    spread = together[~np.eye(len(together), dtype=bool)]
    assert spread.std() == pytest.approx(1, rel=0.05)
    assert np.abs(spread).max() < 6
    # And the number that a query keeps varies as much as that of coins.
    assert centred.sum(axis=-1).var() / 512 == pytest.approx(1, rel=0.15)


def test_dropout_of_queries_whose_words_are_close_is_independent():
    """Also of those whose words are a slot's stride apart: their patterns aren't shifted ones."""
    words_N2 = np.random.default_rng(0).integers(0, 2**32, (64, 2), np.uint32)
    words_N2[::2, 0] = 0  # bits that hide a sum of the slot and the second word
    slots = jnp.arange(512)
    kept = functools.partial(scores.kept, slots_S=slots, rate=0.5)
    drawn = 2.0 * np.asarray(kept(jnp.asarray(words_N2)[None, None]))[0, 0] - 1
    for step in ((0, 1), (0, 2**16), (0, scores._GOLDEN), (1, 0), (2**31, 0)):
        near_N2 = words_N2 + np.asarray(step, np.uint32)
        near = 2.0 * np.asarray(kept(jnp.asarray(near_N2)[None, None]))[0, 0] - 1
        for shift in range(-2, 3):
            together = (drawn * np.roll(near, shift, axis=1)).mean()
            assert abs(together) < 5 / math.sqrt(drawn.size), (step, shift)


def test_each_bit_of_a_word_flips_half_the_bits_of_its_hash():
    x = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    flipped = np.asarray(scores._mix(jnp.asarray(x[:, None] ^ bits)))
    changed = np.asarray(scores._mix(jnp.asarray(x)))[:, None] ^ flipped  # [x, bit of x]
    share = ((changed[:, :, None] & bits) != 0).mean(axis=0)  # [bit of x, bit of its hash]
    assert np.abs(share - 0.5).max() < 6 * 0.5 / math.sqrt(len(x))


def test_dropout_knows_slots_and_heads_not_blocks():
    whole = np.asarray(scores.kept(words(), jnp.arange(512), 0.3))
    keys = jax.random.split(jax.random.key(1), 3)
    part = scores.query_keys(keys[1:], jnp.arange(2, 4), jnp.arange(40, 50))
    block = scores.kept(part, jnp.arange(100, 300), 0.3)
    np.testing.assert_array_equal(block, whole[1:, 2:4, 40:50, 100:300])


def test_dropout_keeps_the_expectation():
    probs = jnp.ones((3, 2, 2, 64, 512))
    dropped = np.asarray(scores.dropped(probs, words(), jnp.arange(512), 0.25))
    assert set(np.unique(dropped).tolist()) == {0.0, float(np.float32(1 / 0.75))}
    assert dropped.mean() == pytest.approx(1, abs=0.01)


# The choice.

SMALL = Work((8, 8, 512, 512), 64, "bfloat16")
LARGE = dataclasses.replace(SMALL, shape=(8, 12, 4096, 4096))


@pytest.mark.parametrize(
    ("platform", "work", "expected"),
    [
        ("cpu", SMALL, "plain"),
        ("cpu", LARGE, "blockwise"),
        ("cpu", dataclasses.replace(LARGE, narrow=True), "blockwise"),
        ("cpu", dataclasses.replace(SMALL, narrow=True), "sliced"),
        ("cpu", dataclasses.replace(SMALL, shape=(8, 8, 128, 128), narrow=True), "plain"),
        ("cpu", dataclasses.replace(SMALL, bias=True), "sliced"),
        ("cpu", dataclasses.replace(SMALL, shape=(4, 8, 1024, 1024)), "blockwise"),
        ("cpu", dataclasses.replace(SMALL, shape=(64, 16, 512, 512)), "plain"),
        ("tpu", SMALL, "splash"),
        ("tpu", dataclasses.replace(SMALL, shape=(8, 8, 128, 128)), "plain"),
        ("tpu", dataclasses.replace(SMALL, bias=True), "plain"),
        ("tpu", dataclasses.replace(LARGE, bias=True), "blockwise"),
        ("tpu", dataclasses.replace(LARGE, dropout=True), "blockwise"),
        ("tpu", dataclasses.replace(LARGE, prefix=True), "blockwise"),
        ("tpu", dataclasses.replace(LARGE, slotted=False), "plain"),
        ("gpu", SMALL, "cudnn"),
        ("gpu", dataclasses.replace(SMALL, dtype="float32"), "plain"),
        ("gpu", dataclasses.replace(LARGE, soft_cap=True), "blockwise"),
        ("gpu", dataclasses.replace(SMALL, head_dim=192), "plain"),
        ("gpu", dataclasses.replace(SMALL, shape=(8, 8, 511, 511)), "plain"),
    ],
)
def test_what_auto_chooses(platform, work, expected):
    assert choose("auto", platform, work) == expected


def test_devices_share_the_scores():
    mesh = MeshConfig(fsdp=4, tensor=2).build()
    # 1.5 GiB on one device, 192 MiB on each of eight.
    work = dataclasses.replace(LARGE, shape=(8, 12, 2048, 2048), bias=True)
    assert choose("auto", "tpu", work) == "blockwise"
    assert choose("auto", "tpu", work, Sharding(mesh, "fsdp_tp")) == "plain"


def test_a_row_that_devices_share_goes_round_the_ring():
    sharding = Sharding(MeshConfig(sequence=8, fsdp=1).build(), "sp")
    assert {choose(asked, "cpu", SMALL, sharding) for asked in kernels.KERNELS} == {"ring"}
    decoding = dataclasses.replace(SMALL, slotted=False)
    assert choose("auto", "cpu", decoding, sharding) == "plain"


@pytest.mark.parametrize("asked", ["plain", "sliced", "blockwise"])
def test_what_is_asked_for_is_done_anywhere(asked):
    for platform in ("cpu", "gpu", "tpu"):
        assert choose(asked, platform, LARGE) == asked
        assert choose(asked, platform, SMALL) == asked


@pytest.mark.parametrize(
    ("asked", "platform", "changed", "message"),
    [
        ("splash", "cpu", {}, "attention_kernel='splash' runs on a TPU, and this program is "
         "compiled for a CPU; 'auto' chooses one that can."),
        ("cudnn", "tpu", {}, "attention_kernel='cudnn' runs on a GPU, and this program is "
         "compiled for a TPU; 'auto' chooses one that can."),
        ("splash", "tpu", {"bias": True}, "attention_kernel='splash' has no way to do a bias on "
         "the logits (relative positions); 'auto' chooses one that can."),
        ("splash", "tpu", {"dropout": True}, "attention_kernel='splash' has no way to do dropout "
         "of attention's probabilities; 'auto' chooses one that can."),
        ("splash", "tpu", {"prefix": True}, "attention_kernel='splash' has no way to do a prefix "
         "that is read in both directions; 'auto' chooses one that can."),
        ("cudnn", "gpu", {"dtype": "float32"}, "attention_kernel='cudnn' has no way to do float32, "
         "only bfloat16 and float16; 'auto' chooses one that can."),
    ],
)  # fmt: skip
def test_kernels_that_cannot_are_refused(asked, platform, changed, message):
    with pytest.raises(UserError) as error:
        choose(asked, platform, dataclasses.replace(SMALL, **changed))
    assert str(error.value) == message


def test_an_unknown_kernel_is_refused(models):
    with pytest.raises(UserError) as error:
        models.tiny("gpt2", attention_kernel="flash")
    assert str(error.value) == (
        "attention_kernel='flash' must be one of auto, plain, sliced, blockwise, splash, cudnn."
    )
