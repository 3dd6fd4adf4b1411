"""A model's counts against XLA's, against arithmetic by hand, and against what papers say."""

import dataclasses
import functools
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import cli, losses, optim, schedules
from t5x_lite.errors import UserError
from t5x_lite.nn import masks, parameters
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.presets import albert, bert, deepseek, gemma3, gpt2, gpt3, llama, mixtral, t5
from t5x_lite.nn.presets import mobilebert as mobile
from t5x_lite.scaling import work
from t5x_lite.scaling.counting import count_model, parameter_counts
from t5x_lite.scaling.work import part_of

T, V, D, N, LAYERS = 32, 128, 1024, 4, 2  # wide: products are nearly all of the work
SHAPE = {"width": D, "layers": LAYERS, "heads": N, "vocab_size": V}
EXPERTS = 4
MODELS = {
    "gpt, tied": functools.partial(gpt2.gpt2, **SHAPE),
    "llama, grouped heads, gated, untied": functools.partial(
        llama.llama, **SHAPE, kv_heads=2, hidden=320
    ),
    "gemma, windows": functools.partial(
        gemma3.gemma3, **SHAPE, kv_heads=2, head_dim=D // N, hidden=320, window=8
    ),
    "bert": functools.partial(bert.bert, **SHAPE),
    "albert, shared layers": functools.partial(albert.albert, **SHAPE),
    "mobilebert, bottlenecks": functools.partial(
        mobile.mobilebert, **SHAPE, bottleneck=256, hidden=D
    ),
    "t5, gated": functools.partial(t5.t5_1_1, **SHAPE, head_dim=D // N, hidden=320),
    "mixture of experts": functools.partial(
        mixtral.mixtral, **SHAPE, kv_heads=2, hidden=320, experts=EXPERTS
    ),
    "latent attention": functools.partial(deepseek.deepseek_v3, width=D, layers=LAYERS),
}


def tiny(name, **options):
    return MODELS[name]("tiny", **options)


@functools.cache
def report(name, **options):
    return count_model(tiny(name), length=T, **options)


def parts(found):
    return {(each["stack"], each["part"]): each["flops"] for each in found["flops"]["parts"]}


def experts_of(model: ModelConfig):
    return next((b.ffn.experts for b in model.main.blocks if hasattr(b.ffn, "router")), 1)


@pytest.mark.parametrize("name", MODELS)
def test_within_two_percent_of_the_unrolled_compiled_program(name):
    model, found = tiny(name, scan=False), report(name)["flops"]
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets"), tokens)
    batch["weights"] = jax.ShapeDtypeStruct((1, T), jnp.float32)
    batch |= {"encoder_tokens": tokens} if model.kind == "encoder-decoder" else {}
    program = work.forward_program(model, losses.CrossEntropy())
    compiled = jax.jit(program).lower(parameters.abstract(model)[0], batch).compile()
    cost = compiled.cost_analysis()
    # On a CPU each token that is sent to an expert meets all of them.
    experts = sum(n for (_, part), n in parts(report(name)).items() if part == "experts")
    expected = found["forward"] + experts * (experts_of(model) - 1)
    assert cost["flops"] == pytest.approx(expected, rel=0.02)
    assert sum(each["flops"] for each in found["parts"]) == found["forward"]


def test_parts_of_a_gpt():
    assert parts(report("gpt, tied")) == {
        ("decoder", "attention"): LAYERS * T * 2 * 4 * D * D,
        ("decoder", "attention scores"): LAYERS * T * 2 * 2 * T * D,
        ("decoder", "feed-forward"): LAYERS * T * 2 * 2 * D * 4 * D,
        ("head", "logits"): T * 2 * D * V,
    } | dict.fromkeys([("embedder", "embedding"), ("decoder", "other"), ("head", "transform")], 0)


def test_parts_of_an_encoder_decoder_work_on_the_tokens_of_their_own_side():
    targets = 8
    found = count_model(tiny("t5, gated"), length=T, target_length=targets)
    flops = parts(found)
    both = LAYERS * 2 * D * D
    assert flops["encoder", "attention"] == 4 * both * T
    assert flops["decoder", "attention"] == 4 * both * targets
    assert flops["decoder", "cross-attention"] == 2 * both * targets
    assert flops["decoder", "cross-attention, keys and values"] == 2 * both * T
    assert flops["decoder", "cross-attention scores"] == LAYERS * 4 * T * targets * D
    assert flops["decoder", "feed-forward"] == LAYERS * 2 * 3 * D * 320 * targets
    assert flops["head", "logits"] == 2 * D * V * targets
    # 6 (D_enc · N_enc + D_dec · N_dec) leaves out scores alone, and counts norms and biases.
    scores = sum(n for (_, part), n in flops.items() if part.endswith("scores"))
    by_side = found["conventions"]["by_side"]["per_token"] * (T + targets)
    assert by_side == pytest.approx(3 * (found["flops"]["forward"] - scores), rel=5e-3)


def test_places_in_gradients_and_checkpoints_are_told_apart_too():
    scanned = "transpose(jvp(Transformer))/Transformer._stack/decoder/decoder._layers/"
    inside = "rematted_computation/layers/attention/"
    assert part_of(f"{scanned}{inside}BKGTS,BSKH->BTKGH")[:2] == ("decoder", "attention scores")
    assert part_of(f"{scanned}{inside}attention._out/out")[:2] == ("decoder", "attention")
    assert part_of("transpose(jvp(mv,vD->mD))")[:2] == ("head", "logits")
    assert part_of("Transformer/x/decoder/layers/ffn/BTE,BT->BE")[1] == "router"


def test_training_is_three_forward_passes_and_what_is_computed_again():
    flops = report("gpt, tied")["flops"]
    logits = T * 2 * D * V
    assert flops["training"] == 3 * flops["forward"]
    assert flops["executed"] == flops["training"]
    again = count_model(tiny("gpt, tied", remat="full"), length=T)["flops"]
    assert again["training"] == flops["training"]
    # All products of the layers but the last of each.
    layers, last = flops["forward"] - logits, LAYERS * T * 2 * D * 4 * D
    assert again["executed"] == flops["executed"] + layers - last


def test_decoding_reads_a_cache_of_a_row():
    found = report("gpt, tied")["flops"]["decoding"]
    assert found == LAYERS * 2 * (12 * D * D + 2 * T * D) + 2 * D * V
    assert "decoding" not in report("bert")["flops"]


def pairs(window, causal):
    slots = masks.slots(T)
    mask = masks.near(slots, slots, window)[0]
    return np.sum(np.tril(mask) if causal else mask) / T**2


def test_scores_that_masks_hide_are_left_out_of_the_visible():
    flops = report("gemma, windows")["flops"]
    scores = parts(report("gemma, windows"))["decoder", "attention scores"]
    windows = [block.attention.window or T for block in tiny("gemma, windows").decoder.blocks]
    assert sorted(windows) == [8, T]
    share = np.mean([pairs(window, causal=True) for window in windows])
    assert flops["visible"] == pytest.approx(flops["forward"] - (1 - share) * scores, rel=1e-9)
    plain = report("bert")["flops"]
    assert plain["visible"] == plain["forward"]
    stack = tiny("gemma, windows").decoder
    both_sides = work.visible_share(dataclasses.replace(stack, causal=False), T)
    assert both_sides == pytest.approx(np.mean([pairs(window, False) for window in windows]))


@pytest.mark.parametrize("name", MODELS)
def test_classes_of_parameters_are_all_of_them(name):
    model = tiny(name)
    found = parameter_counts(model)
    assert found["total"] == parameters.count(model)
    assert "other" not in found["by_class"] or name.startswith("mobilebert")
    assert (found["active"] < found["total"]) == (
        name in ("mixture of experts", "latent attention")
    )


def test_parameters_of_a_gpt_by_class():
    found = parameter_counts(tiny("gpt, tied"))
    classes = {name: each["total"] for name, each in found["by_class"].items()}
    attention, ffn = 4 * D * D + 4 * D, 8 * D * D + 5 * D
    places = parameters.abstract(tiny("gpt, tied"))[0]["decoder"]["positions"]["embedding"].size
    assert classes == {
        "attention": LAYERS * attention,
        "feed-forward": LAYERS * ffn,
        "norms": (2 * LAYERS + 1) * 2 * D,
        "embedding": V * D + places,
    }
    assert found["non_embedding"] == found["total"] - V * D - places


def test_experts_that_a_token_meets():
    """Jiang et al. 2024, §1: 47B and 13B; DeepSeek-AI 2024: 671B, of which 37B are activated."""
    found = parameter_counts(mixtral.mixtral("8x7b"))
    assert (round(found["total"] / 1e9), round(found["active"] / 1e9)) == (47, 13)
    found = parameter_counts(deepseek.deepseek_v3("671b"))
    assert round(found["total"] / 1e9) == 671
    # They don't count the embedding, which a token looks up.
    embedding = found["by_class"]["embedding"]["active"]
    assert round((found["active"] - embedding) / 1e9) == 37


def test_gpt_3_trained_on_as_many_flops_as_its_paper_says():
    """Brown et al. 2020, table D.1: 3.14e23 for 300 billion tokens, as 6N; scores come on top."""
    found = count_model(gpt3.gpt3("175b", vocab_size=50257), tokens=300e9)
    assert found["tokens"]["row"] == 2048
    assert found["conventions"]["6n"]["per_token"] * 300e9 == pytest.approx(3.14e23, rel=2e-3)
    assert found["training"]["flops"] == pytest.approx(3.14e23, rel=0.03)


def test_kaplan_s_estimate_has_causal_scores_and_no_logits():
    found = report("gpt, tied")
    kaplan = found["conventions"]["kaplan"]["per_token"]
    assert kaplan == 6 * found["parameters"]["non_embedding"] + 6 * LAYERS * T * D
    seen = found["flops"]["visible"] - parts(found)["head", "logits"]
    assert kaplan == pytest.approx(3 * seen / T, rel=2e-3)


def test_memory_of_states_and_of_the_cache():
    rate = schedules.constant(1e-3)
    memory = report("llama, grouped heads, gated, untied", optimizer=optim.AdamW(rate))["memory"]
    model = tiny("llama, grouped heads, gated, untied")
    size = parameters.count(model)
    assert (
        memory["parameters"] == memory["gradients"] == {"float32": 4 * size, "bfloat16": 2 * size}
    )
    states = memory["optimizer_state"]
    assert states["AdamW"] == states["this run's"] == pytest.approx(8 * size, abs=16)
    assert states["AdamW, moments in bfloat16"] == pytest.approx(4 * size, abs=16)
    assert states["Adafactor"] < states["AdamW"] / 2
    assert memory["cache_of_a_row"] == 2 * LAYERS * T * 2 * (D // N) * 4


def test_hours_on_chips():
    found = count_model(
        tiny("gpt, tied"), length=T, steps=10, batch_size=4, chip="v5e", chips=8, mfu=0.5
    )
    training = found["training"]
    flops = 40 * found["flops"]["training"]
    assert (training["tokens"], training["flops"]) == (40 * T, flops)
    assert training["hours"] == pytest.approx(flops / (8 * 197e12 * 0.5) / 3600)
    assert training["tokens_per_day"] * training["hours"] == pytest.approx(24 * 40 * T)


@dataclasses.dataclass(frozen=True)
class Decomposed:
    """A loss with a matrix decomposition, whose FLOPs no formula here gives."""

    coefficients: ClassVar[dict[str, float]] = {"trace": 1.0}

    def weights(self, batch):
        return {"trace": jnp.ones(())}

    def __call__(self, apply, params, state, batch, keys):
        hidden = apply(params, batch, keys).hidden_BTD[0]
        return losses.Sums({"trace": jnp.sum(jnp.linalg.cholesky(hidden.T @ hidden))}, {})


def test_what_cannot_be_counted_is_refused():
    model = tiny("gpt, tied")
    for options, message in (
        ({"chip": "abacus"}, r"no chip 'abacus'; there are v4, v5e, v5p, v6e, NVIDIA A100"),
        ({"tokens": -3}, "tokens=-3 must be above 0"),
        ({"mfu": 1.5}, r"mfu=1\.5 is a share"),
        ({"length": 10**6}, "learned positions"),
        ({"target_length": 8}, "target_length=8 is of a decoder beside an encoder"),
        ({"loss": Decomposed()}, "cholesky at .* is a custom call whose FLOPs nobody counted"),
        ({"json_file": "/nowhere/x.json"}, "cannot write /nowhere/x.json"),
    ):
        with pytest.raises(UserError, match=message):
            count_model(model, **{"length": T} | options)


def test_the_verb_needs_a_model_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = ["--json", "counts.json", "--chip", "v5p"]
    assert cli.main(["flops", "--gin_file", "models/t5_1_1/tiny.gin", "--length", "16", *told]) == 0
    printed = capsys.readouterr().out
    assert "encoder 16 tokens, decoder 16 tokens" in printed
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["family"] == "encoder-decoder"
    assert f"{found['parameters']['total']:,}" in printed
    assert cli.main(["flops", "--gin_file", "models/t5_1_1/tiny.gin", "--tokens", "-1"]) == 2
    assert capsys.readouterr().err == "t5x_lite: error: tokens=-1.0 must be above 0 and finite.\n"


def test_of_a_run_it_counts_the_task_s_rows_without_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["--gin_file", "runs/pretrain_t5.gin", "--json", "counts.json"]
    assert cli.main(["flops", *run, "--gin.STEPS=7", "--gin.BATCH_SIZE=16"]) == 0
    found = json.loads((tmp_path / "counts.json").read_text())
    # Spans of three tokens, 15% of them: shorter targets than inputs.
    assert found["tokens"]["decoder"] < found["tokens"]["encoder"]
    assert found["training"]["tokens"] == 7 * 16 * found["tokens"]["row"]
    assert "this run's" in found["memory"]["optimizer_state"]
