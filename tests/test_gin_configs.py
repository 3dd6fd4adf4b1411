"""Every shipped gin file parses, builds and is traced for shapes; nothing is allocated."""

import argparse
import copy

import gin
import jax
import pytest

from t5x_lite import cli
from t5x_lite.nn import parameters
from t5x_lite.nn.presets import bert, gpt2, llama, t5

FAMILIES = {
    "t5_1_0": (t5.t5_1_0, t5.SIZES_1_0),
    "t5_1_1": (t5.t5_1_1, t5.SIZES_1_1),
    "bert": (bert.bert, bert.SIZES),
    "gpt2": (gpt2.gpt2, gpt2.SIZES),
    "llama": (llama.llama, llama.SIZES),
}
MODELS = [
    f"models/{family}/{size}.gin" for family, (_, sizes) in FAMILIES.items() for size in sizes
]
NEEDED = {"PATHS": "'a.txt'", "TFDS": "'a'"}


def shipped(folder):
    return sorted(
        p.relative_to(cli.CONFIGS).as_posix() for p in (cli.CONFIGS / folder).rglob("*.gin")
    )


TASKS = [name for name in shipped("tasks") if name.count("/") == 1 and name != "tasks/base.gin"]
CORPORA = shipped("tasks/corpora")
RUNS = [name for name in shipped("runs") if name != "runs/verbs.gin"]


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def configure(target, files, overrides=(), **fallback):
    args = argparse.Namespace(gin_file=list(files), overrides=list(overrides), model_dir=None)
    return cli.configure(args, target, **fallback)


def value(name):
    """What a macro stands for, built."""
    return copy.deepcopy(gin.query_parameter(f"{name}/gin.macro.value"))


def test_every_size_of_every_preset_has_a_file():
    assert shipped("models") == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_is_the_preset_of_its_name(name):
    _, family, size = name.removesuffix(".gin").split("/")
    configure("t5x_lite.train.describe.describe", [name], model="%MODEL")
    model = value("MODEL")
    assert model == FAMILIES[family][0](size)
    shapes, _ = parameters.abstract(model)
    assert (model.physical_vocab, model.width) in {leaf.shape for leaf in jax.tree.leaves(shapes)}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_replace_each_other(family):
    files = [f"models/{family}/tiny.gin", f"models/{family}/large.gin"]
    files = [file for file in files if file in MODELS] or ["models/llama/13b.gin"]
    for order in (["models/llama/tiny.gin", *files], [*files, "models/llama/7b.gin"]):
        configure("t5x_lite.train.describe.describe", order, model="%MODEL")
        last, size = order[-1].removesuffix(".gin").split("/")[1:]
        assert value("MODEL") == FAMILIES[last][0](size)


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("name", TASKS)
def test_every_objective_takes_every_corpus(name, corpus):
    needed = [
        f"{n}={v}" for n, v in NEEDED.items() if f"%{n}" in (cli.CONFIGS / corpus).read_text()
    ]
    configure("t5x_lite.data.prepare.prepare", [name, corpus], needed, task="%TASK")
    shapes = value("TASK").batches(batch_size=2, length=64, seed=0).shapes
    assert shapes["tokens"][0][0] == 2


def test_the_objectives_differ():
    objectives = set()
    for name in TASKS:
        configure("t5x_lite.data.prepare.prepare", [name], task="%TASK")
        objectives.add(type(value("TASK").objective))
    assert len(objectives) == len(TASKS) == 3
