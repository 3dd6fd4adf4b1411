"""The compile verb: what runs of each family would be on TPUs, by the TPU's compiler."""

import dataclasses
import importlib.util
import inspect
import io
import json

import gin
import jax
import pytest
from rich.console import Console

from t5x_lite import cli, losses, optim, schedules
from t5x_lite.aot import compile as aot
from t5x_lite.aot import remedies
from t5x_lite.aot import topology as topologies
from t5x_lite.arguments import parse
from t5x_lite.data.objectives import CausalLM, MaskedLM, SpanCorruption
from t5x_lite.data.sources import JsonLines
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.mixtral import mixtral
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train import loop
from t5x_lite.train.activations import stored_bytes
from t5x_lite.train.program import train_program

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no libtpu, the TPU compiler: pip install t5x_lite[test,tpu]",
)

L, D, F, V = 2, 256, 512, 512
SHAPE = {"width": D, "layers": L, "heads": 2, "vocab_size": V}
FAMILIES = {
    "t5": (t5_1_1, {"head_dim": 128, "hidden": F}, SpanCorruption()),
    "bert": (bert, {"hidden": F}, MaskedLM()),
    "gpt2": (gpt2, {"hidden": F, "dropout": 0.0}, CausalLM()),
    "llama": (llama, {"kv_heads": 2, "hidden": F}, CausalLM()),
    "mixtral": (mixtral, {"kv_heads": 2, "hidden": F, "experts": 4, "top_k": 2}, CausalLM()),
}
SPLASH = ("gpt2", "llama", "mixtral")  # BERT drops probabilities, T5 adds position biases
ADAMW = optim.AdamW(schedule=schedules.constant(1e-3))


def setting(family, **changes):
    """Arguments of `compile_step`; neither data nor a vocabulary is there."""
    preset, shape, objective = FAMILIES[family]
    model = dataclasses.replace(preset("tiny", **SHAPE, **shape), dtype="bfloat16")
    task = Task("text", JsonLines("nowhere"), Bytes(), objective, data_dir="nowhere")
    quiet = Console(file=io.StringIO(), width=200)
    common = {"batch_size": 8, "length": 256, "optimizer": ADAMW, "console": quiet}
    return {"model": model, "task": task, **common, **changes}


KEYS = {"chip", "chips", "hbm", "fits", "flops", "hbm_bytes", "collectives", "step_seconds", "mfu",
        "bound", "compile_seconds"}  # fmt: skip
MIB = 2**20
ICI, DCN = "ici", "dcn"
# Family, topology, mesh, and rules; MiB that temporaries may take, beside those in a core's own
# memory; what is sent along which axes.
PROGRAMS = {
    "t5 fsdp": (
        *("t5", "v5e-8", {"fsdp": 8}, "fsdp", 10),
        {("all-gather", "fsdp", ICI), ("reduce-scatter", "fsdp", ICI),
         ("all-reduce", "fsdp", ICI), ("all-to-all", "fsdp", ICI)},
    ),
    "bert dp": (
        *("bert", "v5p-8", {"fsdp": 4}, "dp", 40),
        {("all-reduce", "fsdp", ICI)},
    ),
    "gpt2 fsdp_tp": (
        *("gpt2", "v5e-8", {"fsdp": 4, "tensor": 2}, "fsdp_tp", 9),
        {("all-gather", "fsdp", ICI), ("reduce-scatter", "fsdp", ICI),
         ("all-reduce", "fsdp", ICI), ("all-to-all", "fsdp", ICI),
         ("all-reduce", "tensor", ICI), ("all-reduce", "fsdp·tensor", ICI)},
    ),
    "mixtral fsdp_ep": (
        *("mixtral", "v6e-4", {"fsdp": 2, "expert": 2}, "fsdp_ep", 80),
        {("all-gather", "fsdp", ICI), ("reduce-scatter", "fsdp", ICI),
         ("all-reduce", "fsdp", ICI), ("all-to-all", "fsdp", ICI),
         # Tokens go to the experts' devices, and what these make of them is summed.
         ("all-gather", "expert", ICI), ("reduce-scatter", "expert", ICI),
         ("all-reduce", "expert", ICI), ("all-reduce", "fsdp·expert", ICI)},
    ),
    "llama fsdp, slices": (
        *("llama", "2xv5e-4", {"dcn_replica": 2, "fsdp": 4}, "fsdp", 12),
        {("all-gather", "fsdp", ICI), ("reduce-scatter", "fsdp", ICI),
         ("all-reduce", "fsdp", ICI), ("all-to-all", "fsdp", ICI),
         # Gradients alone, of which each chip has its part already.
         ("all-reduce", "replica", DCN)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_training_step_fits_and_sends_what_its_rules_say_and_no_more(name, tmp_path):
    family, topology, axes, rules, most, expected = PROGRAMS[name]
    arguments = setting(family, topology=topology, mesh=MeshConfig(**axes), rules=rules)
    file = tmp_path / "report.json"
    report = aot.compile_step(**arguments, json_file=str(file))
    assert json.loads(file.read_text()) == report
    assert report.keys() >= KEYS
    found = {(row["kind"], row["axis"], row["network"]) for row in report["collectives"]}
    assert found == expected
    assert all(row["count"] > 0 and row["bytes"] > 0 for row in report["collectives"])
    hbm = report["hbm"]
    assert report["fits"]
    assert hbm["temporaries"] <= most * MIB
    held = sum(hbm[part] for part in ("arguments", "output", "temporaries", "code"))
    assert hbm["total"] == held - hbm["alias"]
    # The state is donated: nothing of it is held twice.
    assert hbm["output"] - hbm["alias"] < MIB / 4
    kernels = {"splash_mha_fwd_segmented_residuals", "splash_mha_dkv_segmented_no_residuals"}
    assert {*report["kernels"]} & kernels == (kernels if family in SPLASH else set())
    chip, seconds = topologies.find(topology).chip, report["seconds"]
    peak = report["chips"] * chip.peak["bfloat16"]
    assert seconds["compute"] == pytest.approx(report["matmul_flops"] / peak)
    assert seconds["hbm"] == pytest.approx(report["hbm_bytes"] / chip.bandwidth)
    assert report["step_seconds"] >= max(seconds.values())
    assert report["mfu"] == pytest.approx(report["model_flops"] / peak / report["step_seconds"])
    assert 0 < report["model_flops"] < report["flops"]
    assert 0 < report["mfu"] < 1
    # Parameters and gradients pass through memory, however little else does.
    assert report["hbm_bytes"] > hbm["arguments"] + hbm["output"]
    printed = arguments["console"].file.getvalue()
    assert "modelled step" in printed
    assert f"{report['chips']} {report['chip']} chips" in printed


def test_an_evaluation_step_holds_parameters_alone():
    mesh = MeshConfig(fsdp=4)
    report = aot.compile_step(**setting("t5", topology="v5e-4", mesh=mesh, length=64), verb="eval")
    assert report["fits"]
    assert {row["kind"] for row in report["collectives"]} <= {
        "all-gather", "all-to-all", "all-reduce"
    }  # fmt: skip
    leaves = jax.tree.leaves(parameters.abstract(setting("t5")["model"])[0])
    own = sum(leaf.size for leaf in leaves) // 4 * 4  # float32, a quarter on each chip
    assert own <= report["hbm"]["arguments"] < 1.1 * own
    assert report["hbm"]["alias"] == 0
    assert report["matmul_flops"] == pytest.approx(report["model_flops"], rel=0.02)


def test_decoding_is_compiled_as_a_whole():
    """Prompts, and then a turn for each token; how often the loop runs only the call says."""
    arguments = setting("gpt2", topology="v5e-1", mesh=MeshConfig(), length=64, rules="dp")
    report = aot.compile_step(**arguments, verb="generate", max_tokens=16)
    assert report["fits"]
    assert report["tokens"] == 8 * 16
    assert (report["bound"], report["collectives"]) == ("hbm", [])
    leaves = jax.tree.leaves(parameters.abstract(arguments["model"])[0])
    assert report["hbm_bytes"] > sum(leaf.size for leaf in leaves) * 4
    # Of a layer's products with parameters: 48 positions of the prompts and 15 tokens a row.
    products = L * (4 * D * D + 2 * D * F)
    least = 2 * 8 * (48 + 15) * products
    assert least < report["matmul_flops"] < 1.5 * least


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {"topology": "v5p-9"}, "unknown topology 'v5p-9'; of v5p there are"),
        ("gpt2", {"mesh": MeshConfig(fsdp=64)}, "asks for 64 devices, but there are 4"),
        ("gpt2", {"mesh": MeshConfig(tensor=8)}, "asks for 8 devices or a multiple, but there are"),
        (
            "gpt2",
            {"topology": "2xv5e-4"},
            "has 1 parts across slices, and 2xv5e-4 has 2; set dcn_replica=2",
        ),
        ("gpt2", {"mesh": MeshConfig(dcn_replica=2)}, "has 2 parts across slices, and v5e-4 has 1"),
        ("gpt2", {"batch_size": 6}, "batch_size=6 doesn't divide"),
        ("gpt2", {"length": 1 << 20}, "1048576"),
        ("bert", {"verb": "generate"}, "writes nothing; compile it with --verb eval"),
        ("gpt2", {"verb": "generate", "max_tokens": 256}, "must be at least 1 and less than"),
        ("gpt2", {"verb": "serve"}, "no program of verb 'serve'; there are train, eval, generate"),
        ("bert", {"loss": losses.CrossEntropy(), "model": setting("gpt2")["model"]}, "family|only"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_compiled(family, changes, said):
    with pytest.raises(UserError, match=said):
        aot.compile_step(**setting(family, **{"topology": "v5e-4", **changes}))


def test_a_program_that_does_not_fit_says_by_how_much_and_what_would(tmp_path):
    """The compiler's own word, and an estimate of the nearest changes."""
    file = tmp_path / "report.json"
    arguments = setting("llama", topology="v5e-4", batch_size=1 << 15, mesh=MeshConfig(fsdp=4))
    with pytest.raises(UserError) as error:
        aot.compile_step(**arguments, json_file=str(file))
    report, said = json.loads(file.read_text()), str(error.value)
    print(said)
    assert not report["fits"]
    over = (report["hbm"]["total"] - report["hbm"]["capacity"]) / 2**30
    assert over > 0
    assert f"and has 15.75, {over:.2f} too few" in said


def test_a_fault_of_the_compiler_is_one_line(monkeypatch):
    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no luck\nand a trace")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(UserError, match=r"its own: INTERNAL: no luck; other RULES"):
        aot.compile_step(**setting("llama", topology="v5e-4"))


def fixed(**changes):
    """A `Setting` on a mesh of CPUs."""
    arguments = setting("llama", batch_size=64)
    sharding = Sharding(MeshConfig(fsdp=8).build(), changes.pop("rules", "fsdp"))
    batches = arguments["task"].batches("train", batch_size=64, length=256, seed=0)
    return aot.Setting(
        *(arguments["model"], ADAMW, losses.CrossEntropy(), batches.shapes, 256, MeshConfig()),
        *(sharding, 1, None, None, 1e-3, 64),
    )


def test_remedies_are_the_smallest_changes_that_are_enough(monkeypatch):
    known = {}  # each estimate takes two traces

    def once(model, loss, shapes, sharding, microbatches):
        key = model, sharding, microbatches
        known[key] = known.get(key) or stored_bytes(model, loss, shapes, sharding, microbatches)
        return known[key]

    monkeypatch.setattr(remedies, "stored_bytes", once)
    config = fixed()
    state, activations = remedies.held(config)
    halved = dataclasses.replace(config, microbatches=2)
    assert remedies.held(halved) == (state, pytest.approx(activations / 2, rel=0.01))
    said = remedies.nearest(config, activations // 2)
    assert "remat='minimal' (" in said
    assert "MICROBATCHES=2 or BATCH_SIZE=32 (" in said
    said = remedies.nearest(config, activations // 2 + 2)
    assert "MICROBATCHES=4 or BATCH_SIZE=16 (" in said
    # Eight chips have a row each; fewer rows don't divide among them.
    assert "MICROBATCHES" not in remedies.nearest(config, activations - activations // 10)
    # More than what a batch holds: the state is too large.
    assert "state and gradients alone take" in remedies.nearest(config, activations + 1)
    # Which could be split.
    assert "RULES='fsdp' (" in remedies.nearest(fixed(rules="dp"), 4 * state)


def test_compile_is_given_what_train_is(monkeypatch):
    """By the same macros: every parameter that both have."""
    args = parse(["compile", "--gin_file", "runs/pretrain_t5.gin", "--topology", "v5e-4"])
    cli.configure(args, "t5x_lite.aot.compile.compile_step")
    bound = {}
    for function in (aot.compile_step, loop.train):
        (key,) = cli.bindings_of(function)
        bound[function] = {name: repr(value) for name, value in gin.config._CONFIG[key].items()}
    ours, theirs = bound.values()
    assert ours.items() <= theirs.items()
    both = inspect.signature(aot.compile_step).parameters.keys() & theirs.keys()
    assert both == ours.keys()
    given = inspect.signature(train_program).parameters.keys() - {"sharding", "shapes"}
    assert given <= both


def test_the_command_refuses_with_code_2(capsys):
    command = ["compile", "--gin_file", "runs/pretrain_t5.gin", "--topology", "v9-1"]
    assert cli.main(command) == 2
    assert "unknown topology 'v9-1'; there are v4-" in capsys.readouterr().err
