"""FLOPs counted from jaxprs: against XLA's count of unrolled programs, and against arithmetic."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from t5x_lite import losses
from t5x_lite.aot.count import flops
from t5x_lite.errors import UserError
from t5x_lite.nn import cudnn, masks, parameters, splash
from t5x_lite.nn.presets import bert, gpt2, mixtral, t5
from t5x_lite.train.step import model_apply

B, T, EXPERTS = 2, 32, 4
BATCH = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32)
DIMS = {"width": 256, "heads": 4, "vocab_size": 128, "layers": 2}
MODELS = {
    "gpt": gpt2.gpt2,
    "bert": bert.bert,
    "t5": functools.partial(t5.t5_1_1, head_dim=64, hidden=512),
    "moe": functools.partial(mixtral.mixtral, kv_heads=2, hidden=512, experts=EXPERTS),
}
X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def trace(function, *args):
    return jax.jit(function).trace(*args).jaxpr


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def training(model):
    """A traced gradient of a model's loss."""
    apply, loss = model_apply(model), losses.CrossEntropy()
    batch = {name: shape(B, T, dtype=dtype) for name, dtype in BATCH.items()}
    batch["weights"] = shape(B, T)
    if model.kind == "encoder-decoder":
        batch |= {f"encoder_{name}": batch[name] for name in ("tokens", "segments", "positions")}

    def value(params, batch):
        return loss(apply, params, None, batch, None).terms["cross_entropy"]

    return jax.jit(jax.value_and_grad(value)).trace(parameters.abstract(model)[0], batch)


def by_xla(cost):
    return cost["flops"] + cost["transcendentals"]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_within_two_percent_of_xla_s_count_of_the_unrolled_program(name, remat):
    """Scanned and unrolled are the same work, and XLA counts the latter's right."""
    make = functools.partial(MODELS[name], "tiny", **DIMS, remat=remat)
    unrolled = training(make(scan=False))
    counted = flops(unrolled.jaxpr)
    assert flops(training(make(scan=True)).jaxpr).matmul == counted.matmul
    # The program as it is written has every expert's kernels meet each token.
    experts = sum(count for place, count in counted.products.items() if "experts" in place)
    written = counted.total + (EXPERTS - 1) * experts * (name == "moe")
    assert by_xla(unrolled.lower().cost_analysis()) == pytest.approx(written, rel=0.02)
    assert counted.elementwise < 0.02 * counted.matmul


@pytest.mark.parametrize("name", ["gpt", "t5"])
def test_within_two_percent_of_the_compiled_program(name):
    """But for what is computed twice in one way, which the CPU's compiler would merge."""
    unrolled = training(MODELS[name]("tiny", **DIMS, scan=False))
    options = {"xla_disable_hlo_passes": "cse,cse_barrier_expander"}
    cost = unrolled.lower().compile(compiler_options=options).cost_analysis()
    assert by_xla(cost) == pytest.approx(flops(unrolled.jaxpr).total, rel=0.02)


def test_products_have_their_places():
    places = flops(training(gpt2.gpt2("tiny", **DIMS)).jaxpr).products
    query = [
        place for place in places if place.endswith("layers/attention/attention._project/query")
    ]
    assert len(query) == 2  # forwards and backwards, which has two products
    assert sorted(places[place] for place in query) == [
        n * 2 * B * T * 256 * 256 * 2 for n in (1, 2)
    ]


def test_loops_branches_and_other_arithmetic():
    def loop(x, w):
        x = jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: (x @ w) @ w, lambda x: x @ w, x)

    assert flops(trace(loop, X, SQUARE)).matmul == (7 + 2) * 2 * 8 * 16 * 16
    sums = flops(trace(lambda x: jnp.sum(jnp.exp(x) * x) + 1.0, X))
    assert (sums.matmul, sums.elementwise) == (0, 3 * 8 * 16 + 1)
    assert flops(trace(lambda x: x + 1, shape(8, dtype=jnp.int32))).total == 0


def test_a_loop_without_an_end_needs_a_number_of_turns():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] < 5, lambda x: x @ w, x)

    program = trace(until, X, SQUARE)
    assert flops(program, turns=3).matmul == 3 * 2 * 8 * 16 * 16
    with pytest.raises(UserError, match="a loop at the top runs until a condition is met"):
        flops(program)


def test_convolutions_and_grouped_products():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", feature_group_count=2)

    program = jax.jit(convolve).trace(shape(3, 8, 20), shape(10, 4, 5))
    expected = program.lower().compile().cost_analysis()["flops"]
    assert flops(program.jaxpr).matmul == 2 * 3 * 10 * 16 * 4 * 5 == expected
    ragged = trace(jax.lax.ragged_dot, shape(24, 16), shape(3, 16, 5), shape(3, dtype=jnp.int32))
    assert flops(ragged).matmul == 2 * 24 * 16 * 5


def test_what_a_device_computes_counts_for_each():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)

    def mapped(axes, spec):
        def work(x, w):
            return jax.lax.psum(x @ w, "data") if "data" in axes and spec[0] is None else x @ w

        return jax.shard_map(
            work, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, axis_names=axes
        )

    one = 2 * 8 * 16 * 16
    split = mapped({"data", "model"}, PartitionSpec(("data", "model")))
    assert flops(trace(split, X, SQUARE)).matmul == one
    assert flops(trace(mapped({"data"}, PartitionSpec("data")), X, SQUARE)).matmul == one
    # All four devices along `model` do the same.
    assert (
        flops(trace(mapped({"data", "model"}, PartitionSpec("data")), X, SQUARE)).matmul == 4 * one
    )


def attention(window=None, rematerialised=False):
    """Two layers of splash attention: gradients of four heads on two of keys, 1,024 slots."""
    slots = masks.slots(1024)
    sees = masks.Visibility(slots, slots, None, None, causal=True, slotted=True)
    sees = sees if window is None else sees.replace(window=window)

    def layer(q, k):
        return splash.splash_attend(q, k, k, sees, scale=0.1, block=128)

    layer = jax.checkpoint(layer) if rematerialised else layer

    def value(q, k):
        return jnp.sum(jax.lax.scan(lambda q, _: (layer(q, k), None), q, length=2)[0])

    return flops(trace(jax.grad(value), shape(3, 1024, 4, 64), shape(3, 1024, 2, 64)))


def test_splash_attention_counts_the_blocks_that_it_visits():
    product = 2 * 2 * 128 * 128 * 64 * 3 * 4  # of a block, in both layers, all rows and heads
    row_sums = 2 * 2 * 3 * 4 * 1024 * 64
    causal = 8 * 9 // 2
    # Two products forwards; five backwards, whose two kernels both compute the first two.
    assert attention().matmul == (2 + 3 + 4) * causal * product + row_sums
    again = (2 + 3 + 4 + 2) * causal * product + row_sums
    assert attention(rematerialised=True).matmul == again
    assert attention(window=128).matmul == (2 + 3 + 4) * (8 + 7) * product + row_sums


def test_cudnn_s_attention_is_seven_products_of_the_whole_square():
    sees = masks.everything(128, 128)

    def value(q, k, v):
        return jnp.sum(cudnn.cudnn_attend(q, k, v, sees, scale=0.1).astype(jnp.float32))

    q, k = (shape(2, 128, heads, 64, dtype=jnp.bfloat16) for heads in (4, 2))
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    with mock.patch(version, return_value=91300):
        found = flops(trace(jax.grad(value, (0, 1, 2)), q, k, k))
    assert found.matmul == 7 * 2 * 2 * 4 * 128 * 128 * 64


def test_kernels_say_what_they_cost_or_are_refused():
    def double(estimate):
        def kernel(x, out):
            out[...] = x[...] * 2

        return pl.pallas_call(
            kernel, out_shape=X, name="twice", interpret=True, cost_estimate=estimate
        )

    estimate = pl.CostEstimate(flops=77, transcendentals=5, bytes_accessed=0)
    found = flops(trace(double(estimate), X))
    assert (found.matmul, found.elementwise) == (77, 5)
    with pytest.raises(UserError, match=r"Pallas kernel twice at .* gives no cost_estimate"):
        flops(trace(double(None), X))


def test_a_custom_call_is_never_free():
    for call, name in (
        (jnp.linalg.cholesky, "cholesky"),
        (lambda x: jax.ffi.ffi_call("nobody", SQUARE)(x), "ffi_call"),
    ):
        with pytest.raises(
            UserError, match=f"{name} at .* a custom call whose FLOPs nobody counted"
        ):
            flops(trace(call, SQUARE))
