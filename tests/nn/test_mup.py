"""muP's factors: against the `mup` package's, for every structure, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from t5x_lite.errors import UserError
from t5x_lite.nn import mup, parameters
from t5x_lite.nn.heads import SequenceClassifier
from t5x_lite.nn.layers import FanIn
from t5x_lite.nn.presets.bart import bart
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.deepseek import deepseek_v2
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.mixtral import mixtral


def flat(model, base):
    """path → scale."""
    leaves = jax.tree_util.tree_leaves_with_path(mup.scales(model, base), is_leaf=mup.is_scale)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): scale for p, scale in leaves}


# Four times as wide, of `mup` 1.0.0 by its authors (set_base_shapes, MuReadout, MuSharedReadout and
# MuAdam, on a torch module with these layers): (deviation, rate) beside the base's. Its readout has
# (1, 1) and a multiplier of 1/4, which here is in the values and the rate of a head's kernel, or of
# the norm before a tied one.
PACKAGE = {
    "embedder/embedding": (1, 1),
    "decoder/positions/embedding": (1, 1),
    "decoder/layers/attention/key/kernel": (0.5, 0.25),
    "decoder/layers/attention/key/bias": (1, 1),
    "decoder/layers/ffn/up/kernel": (0.5, 0.25),
    "decoder/layers/ffn/up/bias": (1, 1),
    "decoder/layers/ffn/down/kernel": (0.5, 0.25),
    "decoder/layers/ffn_norm/scale": (1, 1),
    "decoder/layers/ffn_norm/bias": (1, 1),
    "decoder/final_norm/scale": (0.25, 0.25),
    "decoder/final_norm/bias": (0.25, 0.25),
    "head/kernel": (0.25, 0.25),
}


def test_factors_are_those_of_the_mup_package():
    tied = flat(gpt2("tiny", width=128, heads=8), gpt2("tiny", width=32, heads=2))
    shape = {"heads": 4, "kv_heads": 4}
    untied = flat(
        llama("tiny", width=128, **shape, hidden=344), llama("tiny", width=32, **shape, hidden=86)
    )
    found = {**tied, "head/kernel": untied["head/kernel"]}
    assert {path: (found[path].spread, found[path].rate) for path in PACKAGE} == PACKAGE
    assert untied["decoder/final_norm/scale"].rate == 1
    # Normal(0.02) draws alike at every width, FanIn narrower by itself.
    assert found["decoder/layers/ffn/up/kernel"].drawn == 0.5
    fan_in = [dataclasses.replace(gpt2("tiny", width=width), init=FanIn()) for width in (128, 32)]
    assert flat(*fan_in)["decoder/layers/ffn/up/kernel"].drawn == pytest.approx(1)


def test_a_ratio_of_one_leaves_everything_as_it_is():
    model = gpt2("tiny")
    assert {
        (s.drawn, s.shift, s.spread, s.rate, s.entries) for s in flat(model, model).values()
    } == {(1, 0, 1, 1, 1)}
    params = {"x": jnp.ones(3)}
    assert mup.initial(params, {"x": mup.Scale("input")})["x"] is params["x"]


def test_what_goes_to_few_outputs_is_an_output():
    """Routers, keys of heads that don't become more, latents that stay narrow."""
    wide = mixtral("tiny", width=256, heads=8, kv_heads=2, hidden=512)
    found = flat(wide, mixtral("tiny", width=128, heads=4, kv_heads=2, hidden=256))
    kinds = {path.split("layers/")[-1]: scale.kind for path, scale in found.items()}
    assert kinds["ffn/router/kernel"] == kinds["attention/key/kernel"] == "output"
    assert kinds["ffn/experts/up/kernel"] == kinds["attention/query/kernel"] == "hidden"
    latents = [deepseek_v2("tiny", width=width, heads=width // 32) for width in (256, 128)]
    found = flat(*latents)
    assert found["decoder/layers/attention/kv_down/kernel"].kind == "output"
    assert found["decoder/layers/attention/up/kernel"].kind == "input"


def test_unrolled_layers_have_the_factors_of_the_stack():
    """The last norm of BART's decoder has no norm after it: it alone is scaled."""
    scanned, unrolled = (
        flat(bart("tiny", width=256, heads=8, scan=scan), bart("tiny")) for scan in (True, False)
    )
    stacked = scanned["decoder/layers/ffn_norm/scale"].rate
    single = [unrolled[f"decoder/layers_{n}/ffn_norm/scale"].rate for n in range(2)]
    assert single == stacked.tolist() == [1, 0.5]
    assert unrolled["encoder/layers_1/ffn_norm/scale"].rate == 1
    shapes = parameters.abstract(bart("tiny", scan=False))[0]
    assert len(unrolled) == len(jax.tree.leaves(shapes))


def test_only_widths_of_the_base_are_read():
    base = gpt2("tiny", width=64, layers=3, vocab_size=77, positions=9, dtype="bfloat16")
    model = gpt2("tiny", scan=False)
    assert flat(model, base) == flat(model, gpt2("tiny", width=64))
    labels = dataclasses.replace(model, head=SequenceClassifier(labels=3))
    assert flat(labels, base)["head/classifier/kernel"].kind == "output"
    assert flat(labels, base)["decoder/final_norm/scale"].rate == 1


def test_what_has_no_parametrisation_is_refused():
    with pytest.raises(UserError, match="MUP_BASE is encoder-only and the model decoder-only"):
        mup.scales(gpt2("tiny"), bert("tiny"))
    with pytest.raises(UserError, match=r"of another family .* give the model's own family"):
        mup.scales(gpt2("tiny"), llama("tiny"))
    model = gpt2("tiny", width=256)
    bare = dataclasses.replace(model.decoder, final_norm=None)
    bare = dataclasses.replace(model, decoder=bare)
    base = dataclasses.replace(gpt2("tiny"), decoder=dataclasses.replace(bare.decoder))
    with pytest.raises(UserError, match="give the model a final_norm, or a head with tied=False"):
        mup.scales(bare, dataclasses.replace(base, width=128))
