import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses
from t5x_lite.decode.fill_mask import fill_mask, mask_positions
from t5x_lite.decode.prompts import right_pad
from t5x_lite.errors import UserError
from t5x_lite.nn.presets.paired import paired
from t5x_lite.nn.transformer import Transformer

MASK = 6
ROWS = [[4, MASK, 9, 33, MASK, MASK, 5], [4, 80, MASK, 5]]


def test_candidates_are_the_likeliest_ids_of_each_mask(tiny):
    model, params = tiny("bert")
    banned = np.zeros(128, bool)
    banned[:50] = True
    batch = right_pad(ROWS)
    free = fill_mask(model, params, batch, MASK, 7, jnp.zeros(128, bool))
    strict = fill_mask(model, params, batch, MASK, 7, jnp.asarray(banned))
    apply = jax.jit(lambda params, batch: losses.logits(model.apply({"params": params}, batch)))
    for i, row in enumerate(ROWS):
        logits = np.asarray(apply(params, right_pad([row], 7)))[0].astype(np.float64)
        masks = [t for t, token in enumerate(row) if token == MASK]
        assert free.positions_BM[i].tolist() == masks + [-1] * (4 - len(masks))
        for result, allowed in ((free, np.arange(100)), (strict, np.arange(50, 100))):
            for m, t in enumerate(masks):
                best = sorted(allowed, key=lambda v, t=t: -logits[t, v])[:7]
                assert result.ids_BMK[i, m].tolist() == best
                expected = logits[t, best] - np.logaddexp.reduce(logits[t])
                np.testing.assert_allclose(result.logprobs_BMK[i, m], expected, atol=2e-5)


def test_a_head_for_pairs_of_texts_fills_masks_too(tiny):
    model, params = tiny("bert")
    both = Transformer(paired(model.config))
    eye = {"kernel": np.eye(model.config.width), "bias": np.zeros(model.config.width)}
    pairs = {"kernel": np.zeros((model.config.width, 2)), "bias": np.zeros(2)}
    head = params["head"] | jax.tree.map(np.float32, {"pooler": eye, "pairs": pairs})
    batch = right_pad(ROWS)
    found = fill_mask(both, {**params, "head": head}, batch, MASK)
    expected = fill_mask(model, params, batch, MASK)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_masks_are_counted_up_to_a_power_of_two():
    tokens = np.array([[MASK] * 5, [1, MASK, 1, 1, 1]])
    assert mask_positions(tokens, MASK).tolist() == [[0, 1, 2, 3, 4, -1, -1, -1], [1] + [-1] * 7]


def test_what_cannot_be_filled_is_refused(tiny):
    model, _ = tiny("bert")
    with pytest.raises(UserError, match="row 1 has no mask"):
        fill_mask(model, {}, right_pad([[MASK], [3]]), MASK)
    with pytest.raises(UserError, match="candidates=101 must lie between 1 and 100"):
        fill_mask(model, {}, right_pad([[MASK]]), MASK, 101)
    with pytest.raises(UserError, match="513 tokens and the model 512"):
        fill_mask(model, {}, right_pad([[MASK] * 513]), MASK)
    with pytest.raises(UserError, match="mask_id"):
        fill_mask(model, {}, right_pad([[MASK]]), 100)
    with pytest.raises(UserError, match="decoder-only"):
        fill_mask(tiny("llama")[0], {}, right_pad([[MASK]]), MASK)
