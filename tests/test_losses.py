"""Losses against a NumPy reference that knows neither the padding of the vocabulary nor of rows."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import cross_entropy, losses
from t5x_lite.cross_entropy import Scores
from t5x_lite.errors import UserError
from t5x_lite.flops import matmul_flops
from t5x_lite.partitioning import MeshConfig, Rules, Sharding
from t5x_lite.types import Output, Unembedding

V, PHYSICAL, D = 11, 16, 6
SHAPE = (3, 5)


@pytest.fixture(scope="module")
def arrays():
    """Hidden states, an unembedding whose padding is as large as the rest, targets, weights."""
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.standard_normal((*SHAPE, D), np.float32),
        "kernel": rng.standard_normal((PHYSICAL, D), np.float32),
        "bias": rng.standard_normal(PHYSICAL, np.float32) + 3 * (np.arange(PHYSICAL) >= V),
        "targets": rng.integers(0, V, SHAPE).astype(np.int32),
        "weights": rng.choice([0, 1, 1, 0.5], SHAPE).astype(np.float32),
    }


def output_of(a, physical=PHYSICAL, dtype=jnp.float32):
    kernel, bias = jnp.asarray(a["kernel"][:physical], dtype), jnp.asarray(a["bias"][:physical])
    return Output(jnp.asarray(a["hidden"], dtype), Unembedding(kernel, bias, V))


def reference(a):
    """log p [B, T, V] and log Z [B, T], in double precision."""
    logits = np.einsum("btd,vd->btv", a["hidden"].astype(np.float64), a["kernel"][:V])
    logits += a["bias"][:V]
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    return logits - log_z[..., None], log_z


def sums(loss, a, **options):
    batch = {name: jnp.asarray(a[name]) for name in ("targets", "weights")}
    return loss(lambda params, batch, keys: output_of(a, **options), {}, None, batch, None)


def test_token_logprobs_are_a_distribution_over_the_logical_vocabulary(arrays):
    output = output_of(arrays)
    every = jnp.broadcast_to(jnp.arange(V)[:, None, None], (V, *SHAPE))
    each = jax.jit(jax.vmap(losses.token_logprobs, in_axes=(None, 0)))(output, every)
    np.testing.assert_allclose(np.exp(each).sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(np.moveaxis(each, 0, -1), reference(arrays)[0], atol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_equals_the_reference(arrays, smoothing, z_loss):
    logprobs, log_z = reference(arrays)
    loss = losses.CrossEntropy(smoothing, z_loss)
    found = sums(loss, arrays)

    aim = np.full((*SHAPE, V), smoothing / V)
    np.put_along_axis(aim, arrays["targets"][..., None], 1 - smoothing + smoothing / V, axis=-1)
    cross_entropy = -np.sum(aim * logprobs * arrays["weights"][..., None])
    square = np.sum(log_z**2 * arrays["weights"])
    total = float(found.terms["cross_entropy"])
    assert total == pytest.approx(cross_entropy + z_loss * square, rel=1e-6)
    assert loss.coefficients == {"cross_entropy": 1}
    assert ("z_loss" in found.metrics) == bool(z_loss)
    if z_loss:
        parts = {name: float(found.metrics[name][0]) for name in ("cross_entropy", "z_loss")}
        expected = {"cross_entropy": cross_entropy, "z_loss": square}
        assert parts == pytest.approx(expected, rel=1e-6)
    weights = loss.weights({"weights": jnp.asarray(arrays["weights"])})
    assert {name: float(w) for name, w in weights.items()} == dict.fromkeys(
        found.terms, arrays["weights"].sum()
    )


def test_accuracy_counts_the_weighted_targets_that_are_most_likely(arrays):
    likeliest = reference(arrays)[0].argmax(axis=-1).astype(np.int32)
    half = np.arange(likeliest.size).reshape(SHAPE) % 2
    arrays = {**arrays, "targets": np.where(half, likeliest, arrays["targets"])}
    right = likeliest == arrays["targets"]
    assert 0 < np.sum(right * arrays["weights"]) < np.sum(right)
    found, weight = sums(losses.CrossEntropy(), arrays).metrics["accuracy"]
    assert float(found) == np.sum(right * arrays["weights"])
    assert float(weight) == arrays["weights"].sum()


def test_values_computed_by_hand():
    """Logits 0, log 2, log 3 have Z = 6. PyTorch's documentation of CrossEntropyLoss: smoothing ε
    gives (1 - ε) · (-log p[target]) + ε / V · Σ -log p."""
    logits = jnp.log(jnp.asarray([[1.0], [2.0], [3.0]]))
    output = Output(jnp.ones((1, 1, 1)), Unembedding(logits, None, 3))
    batch = {"targets": jnp.full((1, 1), 2, jnp.int32), "weights": jnp.ones((1, 1))}
    found = losses.CrossEntropy(0.3, 1.0)(lambda *_: output, {}, None, batch, None).metrics
    by_hand = 0.7 * math.log(2) + 0.1 * (math.log(6) + math.log(3) + math.log(2))
    assert float(found["cross_entropy"][0]) == pytest.approx(by_hand, rel=1e-6)
    assert float(found["z_loss"][0]) == pytest.approx(math.log(6) ** 2, rel=1e-6)


@pytest.mark.parametrize("loss", [losses.CrossEntropy(), losses.CrossEntropy(0.1, 1e-2)])
def test_padding_of_the_vocabulary_gets_no_gradient_and_changes_nothing(arrays, loss):
    def value(kernel, bias):
        found = sums(loss, arrays | {"kernel": kernel, "bias": bias}, physical=len(bias)).terms
        return sum(loss.coefficients[name] * term for name, term in found.items())

    gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    kernel, bias = jnp.asarray(arrays["kernel"]), jnp.asarray(arrays["bias"])
    padded, (padded_kernel, padded_bias) = gradient(kernel, bias)
    plain, (plain_kernel, plain_bias) = gradient(kernel[:V], bias[:V])
    assert float(padded) == pytest.approx(float(plain), rel=1e-6)
    np.testing.assert_allclose(padded_kernel[:V], plain_kernel, atol=1e-6)
    np.testing.assert_allclose(padded_bias[:V], plain_bias, atol=1e-6)
    assert not np.any(padded_kernel[V:])
    assert not np.any(padded_bias[V:])


def test_targets_of_weight_zero_change_nothing(arrays):
    loss, off = losses.CrossEntropy(0.1, 1e-2), arrays["weights"] == 0
    assert off.any()
    # An id that no vocabulary has, as other libraries mark what isn't a target.
    other = arrays | {"targets": np.where(off, -100, arrays["targets"]).astype(np.int32)}
    assert jax.tree.map(float, sums(loss, arrays)) == jax.tree.map(float, sums(loss, other))

    def value(hidden):
        return sums(loss, arrays | {"hidden": hidden}).terms["cross_entropy"]

    gradient = np.asarray(jax.jit(jax.grad(value))(jnp.asarray(arrays["hidden"])))
    assert not np.any(gradient[off])
    assert np.all(np.any(gradient[~off], axis=-1))


def test_logits_of_bfloat16_states_are_summed_in_float32(arrays):
    output = output_of(arrays, dtype=jnp.bfloat16)
    logits = losses.logits(output)
    assert logits.dtype == jnp.float32
    rounded = {
        "hidden": np.asarray(output.hidden_BTD, np.float32),
        "kernel": np.asarray(output.unembedding.kernel_VD, np.float32),
    }
    logprobs, log_z = reference(arrays | rounded)
    np.testing.assert_allclose(logits[..., :V], logprobs + log_z[..., None], atol=1e-5)


def test_large_logits_stay_finite(arrays):
    large = arrays | {"hidden": arrays["hidden"] * 1e4}
    found = sums(losses.CrossEntropy(0.1, 1e-4), large)
    assert all(np.isfinite(term) for term in found.terms.values())


def test_impossible_losses_are_refused():
    for options in ({"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1e-4}):
        with pytest.raises(UserError, match=next(iter(options))):
            losses.CrossEntropy(**options)


# --- in chunks -----------------------------------------------------------------------------------


def plain_score(hidden, head, targets):
    """Scores from all logits at once, which JAX differentiates."""
    logits = losses.logits(Output(hidden, head))
    ids = jnp.arange(logits.shape[-1])[None, None, :]
    real = jnp.where(ids < head.vocab_size, logits, 0.0)
    return Scores(
        jnp.sum(jnp.where(ids == targets[:, :, None], logits, 0.0), axis=-1),
        jax.nn.logsumexp(logits, axis=-1),
        jax.lax.stop_gradient(jnp.max(logits, axis=-1)),
        jnp.sum(real, axis=-1) / head.vocab_size,
    )


CHUNKED = {"batch": 8, "length": 12, "width": 16, "vocab": 100, "physical": 104}


@pytest.fixture(scope="module")
def chunked():
    """(hidden, kernel, bias, targets, cotangents) at initial scale; one target is no id."""
    rng, c = np.random.default_rng(0), CHUNKED
    shape = c["batch"], c["length"]
    targets = rng.integers(0, c["vocab"], shape).astype(np.int32)
    targets[0, 0] = -100
    return (
        rng.standard_normal((*shape, c["width"]), np.float32),
        rng.standard_normal((c["physical"], c["width"]), np.float32) * c["width"] ** -0.5,
        rng.standard_normal(c["physical"], np.float32),
        targets,
        Scores(*(rng.standard_normal(shape, np.float32) for _ in range(4))),
    )


def scored_with_gradients(of, sharding=None, soft_cap=None, bias=True, dtype=jnp.float32):
    """Compiled: scores, and the gradients of (hidden, kernel, bias) for any cotangents."""

    @jax.jit
    def run(hidden, kernel, b, targets, cotangents):
        def scores(hidden, kernel, b):
            cast = hidden.astype(dtype), kernel.astype(dtype)
            head = Unembedding(cast[1], b if bias else None, CHUNKED["vocab"], soft_cap, sharding)
            return of(cast[0], head, targets)

        result, pull_back = jax.vjp(scores, hidden, kernel, b)
        return result, pull_back(cotangents)

    return run


def on(sharding, arrays):
    """The arrays laid out over the mesh as a model's are."""
    axes = ("batch", "length"), ("vocab", "embed"), ("vocab",)
    names = ((*axes[0], None), axes[1], axes[2], axes[0], Scores(*(axes[0],) * 4))
    leaves, tree = jax.tree.flatten(arrays)
    names = tree.flatten_up_to(names)
    return tree.unflatten(
        [jax.device_put(x, sharding.named(n, x.shape)) for x, n in zip(leaves, names, strict=True)]
    )


def largest_error(found, expected):
    """Largest error over largest value, of the worst leaf."""
    return max(
        float(np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


def in_chunks(chunk_bytes):
    return lambda *arrays: cross_entropy.score(*arrays, chunk_bytes)


# 96 tokens and 104 rows: all in one chunk; 3 of tokens and the whole vocabulary; both cut, neither
# evenly; a logit at a time.
@pytest.mark.parametrize(
    "chunk_bytes", [None, 13_400, 1_100, pytest.param(4, marks=pytest.mark.grid)]
)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_chunks_change_neither_scores_nor_gradients(chunked, chunk_bytes, soft_cap):
    options = {"soft_cap": soft_cap, "bias": soft_cap is None}
    expected = scored_with_gradients(plain_score, **options)(*chunked)
    found = scored_with_gradients(in_chunks(chunk_bytes), **options)(*chunked)
    assert largest_error(found[0], expected[0]) <= 1e-6
    *gradients, bias = found[1]
    *others, other_bias = expected[1]
    assert largest_error(gradients, others) <= 1e-6
    assert np.any(other_bias) == (soft_cap is None)
    np.testing.assert_allclose(bias, other_bias, rtol=1e-6, atol=1e-6 * np.abs(other_bias).max())


def test_chunks_in_bfloat16_round_as_often_as_all_at_once(chunked):
    """Gradients are float32 sums of bfloat16 products, both ways: 2^-8 is the unit."""
    expected = scored_with_gradients(plain_score)(*chunked)
    found = scored_with_gradients(in_chunks(1_100), dtype=jnp.bfloat16)(*chunked)
    assert largest_error(found, expected) < 2e-2


# Rows over the data axes, the length over "sequence", the vocabulary over "tensor".
MESHES = {
    "fsdp_tp_sp": MeshConfig(fsdp=2, tensor=2, sequence=2),
    "tp": MeshConfig(fsdp=1, tensor=4, replica=2),
    "fsdp": MeshConfig(fsdp=4, replica=2),
    # The vocabulary over an axis that splits rows as well.
    Rules("fsdp_tp", {"vocab": ("tensor", "fsdp"), "embed": ()}): MeshConfig(fsdp=4, tensor=2),
}


@pytest.mark.parametrize("table", [*MESHES], ids=str)
def test_a_mesh_changes_neither_scores_nor_gradients(chunked, table):
    sharding = Sharding(MESHES[table].build(), table)
    arrays = on(sharding, chunked)
    expected = scored_with_gradients(plain_score, sharding, 2.0)(*arrays)
    found = scored_with_gradients(in_chunks(1_100), sharding, 2.0)(*arrays)
    assert largest_error(found, expected) <= 1e-6
    if isinstance(table, str):  # else the gradient is put there by what uses it
        assert found[1][1].sharding.is_equivalent_to(arrays[1].sharding, 2)


def collectives(text):
    """(kind, elements of the largest result) of each in a program's text."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append(
                (match[2], max(math.prod(map(int, filter(None, s.split(",")))) for s in shapes))
            )
    return found


def test_only_sums_cross_a_divided_vocabulary(chunked):
    """Four numbers a token there, gradients of hidden states back; no logits, no kernel."""
    sharding = Sharding(MeshConfig(fsdp=1, tensor=8).build(), "tp")
    arrays = on(sharding, chunked)
    text = scored_with_gradients(in_chunks(1_100), sharding).lower(*arrays).compile().as_text()
    tokens = CHUNKED["batch"] * CHUNKED["length"]
    sizes = collectives(text)
    assert {kind for kind, _ in sizes} == {"all-reduce"}
    assert sorted(size for _, size in sizes) == [tokens, 3 * tokens, tokens * CHUNKED["width"]]


def test_all_logits_are_never_stored():
    """Neither by their shape nor by their size, with the chunks that are chosen unasked."""
    tokens, length, width, vocab = 2048, 256, 8, 1024
    shapes = [(tokens // length, length, width), (vocab, width), (tokens // length, length)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32]
    arrays = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]

    def compiled(of):
        def total(hidden, kernel, targets):
            scores = of(hidden, Unembedding(kernel, None, vocab - 3), targets)
            return jnp.sum(scores.log_z - scores.target)

        return jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arrays).compile()

    everything = tokens * vocab * 4
    plain, chunked = compiled(plain_score), compiled(cross_entropy.score)
    assert plain.memory_analysis().temp_size_in_bytes >= everything
    assert chunked.memory_analysis().temp_size_in_bytes < everything / 2
    largest = [
        max(math.prod(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", c.as_text()))
        for c in (plain, chunked)
    ]
    assert largest[0] == tokens * vocab
    assert largest[1] <= tokens * vocab / 4


def summed(hidden, head, targets, chunk_bytes):
    weights = jnp.linspace(0.0, 2.0, targets.size).reshape(targets.shape)
    return cross_entropy.total(hidden, head, targets, weights, each, chunk_bytes)[0]


def plain_sum(hidden, head, targets, chunk_bytes):
    weights = jnp.linspace(0.0, 2.0, targets.size).reshape(targets.shape)
    return jnp.sum(each(plain_score(hidden, head, targets), weights))


def each(scores, weights):
    return weights * (scores.log_z - 0.9 * scores.target - 0.1 * scores.mean + scores.log_z**2 / 99)


@pytest.mark.parametrize("table", [None, *MESHES], ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 13_400, 1_100])
def test_a_sum_over_tokens_has_the_gradients_of_all_logits_at_once(chunked, chunk_bytes, table):
    sharding = table and Sharding(MESHES[table].build(), table)
    hidden, kernel, _, targets, _ = on(sharding, chunked) if table else jax.device_put(chunked)

    def run(of):
        def value(hidden, kernel):
            head = Unembedding(kernel, None, CHUNKED["vocab"], 2.0, sharding)
            return 3.0 * of(hidden, head, targets, chunk_bytes)

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(hidden, kernel)

    assert largest_error(run(summed), run(plain_sum)) <= 1e-6


def test_a_sum_over_tokens_computes_its_logits_once():
    """Where the vocabulary isn't cut; else twice."""
    tokens, width, vocab = 1024, 8, 512
    shapes = (1, tokens, width), (vocab, width), (1, tokens)

    def products(chunk_bytes):
        def value(hidden, kernel, targets):
            return summed(hidden, Unembedding(kernel, None, vocab), targets, chunk_bytes)

        arrays = [jnp.zeros(shape, jnp.float32) for shape in shapes[:2]]
        found = matmul_flops(jax.grad(value, (0, 1)), *arrays, jnp.zeros(shapes[2], jnp.int32))
        return found / (2 * tokens * vocab * width)

    assert products(None) == 3
    assert products(256 * vocab) == 4  # half of the vocabulary at a time


@pytest.mark.parametrize("tokens", [1, 100, 8192])
@pytest.mark.parametrize("rows", [7, 1000, 131_072])
@pytest.mark.parametrize("chunk_bytes", [4, 50_000, None])
def test_chunks_fit_their_budget(tokens, rows, chunk_bytes):
    plan = cross_entropy._Plan(rows, None, chunk_bytes, None)
    of_tokens, of_rows = plan.cuts(tokens, rows)
    size = -(-tokens // of_tokens) * -(-rows // of_rows) * 4
    fewest = min(tokens, cross_entropy.FEWEST_TOKENS) * rows * 4
    default = max(cross_entropy.SMALLEST_CHUNK, tokens * rows * 4 / 8, fewest)
    assert size <= (chunk_bytes or min(default, cross_entropy.LARGEST_CHUNK))


def test_a_budget_without_room_is_refused(chunked):
    with pytest.raises(UserError, match="chunk_bytes=3"):
        scored_with_gradients(in_chunks(3))(*chunked)


# --- one result a row ----------------------------------------------------------------------------


def rowwise(loss, aux, batch):
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    output = Output(jnp.zeros((1, 1, 1)), aux=jax.tree.map(jnp.asarray, aux))
    found = loss(lambda *_: output, {}, None, batch, None)
    (term,) = loss.coefficients
    assert loss.coefficients == {term: 1.0}
    weight = batch["label_weights"].sum()
    assert {n: float(w) for n, w in loss.weights(batch).items()} == {term: float(weight)}
    assert all(float(w) == float(weight) for _, w in found.metrics.values())
    metrics = {name: float(total / weight) for name, (total, _) in found.metrics.items()}
    return float(found.terms[term] / weight), metrics


@pytest.fixture(scope="module")
def scored():
    """Scores of 4 labels for 6 rows, two of which are padding with a label that isn't one."""
    rng = np.random.default_rng(0)
    return {
        "logits": rng.standard_normal((6, 4), np.float32),
        "labels": np.array([2, 0, 3, 1, 0, -1], np.int32),
        "label_weights": np.array([1, 1, 1, 1, 0, 0], np.float32),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_is_optax_cross_entropy_over_real_rows(scored, smoothing):
    loss, metrics = rowwise(losses.Classification(smoothing), {"logits": scored["logits"]}, scored)
    logits, labels = scored["logits"][:4], scored["labels"][:4]
    aim = optax.smooth_labels(jax.nn.one_hot(labels, 4), smoothing)
    assert loss == pytest.approx(float(optax.softmax_cross_entropy(logits, aim).mean()), rel=1e-6)
    assert metrics == {"accuracy": np.mean(logits.argmax(axis=1) == labels)}
    assert losses.Classification(0.1).plain == losses.Classification()


def test_regression_is_the_mean_squared_error_over_real_rows(scored):
    batch = scored | {"labels": np.linspace(-2, 3, 6, dtype=np.float32)}
    loss, metrics = rowwise(losses.Regression(), {"logits": scored["logits"][:, :1]}, batch)
    error = scored["logits"][:4, 0] - batch["labels"][:4]
    assert loss == pytest.approx(np.mean(error**2), rel=1e-6)
    assert metrics == {"absolute_error": pytest.approx(np.mean(abs(error)), rel=1e-6)}


def test_spans_are_chosen_among_real_tokens():
    rng = np.random.default_rng(0)
    start, end = rng.standard_normal((2, 5, 7), np.float32)
    lengths = [7, 4, 5, 6, 0]
    segments = (np.arange(7)[None] < np.array(lengths)[:, None]).astype(np.int32)
    spans = np.array([[0, 0], [1, 3], [2, 2], [5, 5], [0, 0]], np.int32)
    spans[0] = start[0].argmax(), end[0].argmax()
    spans[1] = start[1, :4].argmax(), end[1, :4].argmin()
    batch = {"spans": spans, "segments": segments, "label_weights": np.array([1.0, 1, 1, 1, 0])}
    batch["label_weights"] = batch["label_weights"].astype(np.float32)
    loss, metrics = rowwise(
        losses.SpanExtraction(), {"start_logits": start, "end_logits": end}, batch
    )
    each = [
        float(optax.softmax_cross_entropy_with_integer_labels(row[:n], span))
        for scores, place in ((start, 0), (end, 1))
        for row, n, span in zip(scores[:4], lengths[:4], spans[:4, place], strict=True)
    ]
    assert loss == pytest.approx(np.mean(each), rel=1e-6)
    right = [
        start[n, : lengths[n]].argmax() == spans[n, 0]
        and end[n, : lengths[n]].argmax() == spans[n, 1]
        for n in range(4)
    ]
    assert metrics == {"accuracy": np.mean(right)}
    assert 0 < np.mean(right) < 1


@pytest.mark.parametrize("loss", [losses.Classification(0.1), losses.Regression()])
def test_padding_rows_get_no_gradient(scored, loss):
    labels = scored["labels"].astype(np.float32 if loss == losses.Regression() else np.int32)
    batch = {"labels": jnp.asarray(labels), "label_weights": jnp.asarray(scored["label_weights"])}

    def value(logits):
        output = Output(jnp.zeros((1, 1, 1)), aux={"logits": logits})
        return sum(loss(lambda *_: output, {}, None, batch, None).terms.values())

    gradient = np.asarray(jax.grad(value)(jnp.asarray(scored["logits"])))
    assert not gradient[4:].any()
    assert gradient[:4].any(axis=1).all()


def test_an_impossible_smoothing_of_labels_is_refused():
    with pytest.raises(UserError, match=r"label_smoothing=1\.0"):
        losses.Classification(1.0)
