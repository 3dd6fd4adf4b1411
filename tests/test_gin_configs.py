"""Every shipped gin file parses, builds and is traced for shapes; nothing is allocated."""

import argparse
import copy
import dataclasses

import gin
import jax
import pytest

from t5x_lite import cli, optim
from t5x_lite.data import curate
from t5x_lite.data.curate import run as curate_run
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets import (
    albert,
    bart,
    bert,
    deepseek,
    distilbert,
    gemma2,
    gemma3,
    gpt2,
    gpt3,
    llama,
    mixtral,
    mobilebert,
    modernbert,
    phi3,
    qwen3,
    roberta,
    t5,
    tinybert,
    transformer,
)
from t5x_lite.train import loop
from t5x_lite.train.state import init_state
from t5x_lite.train.step import make_train_step, model_apply

FAMILIES = {
    "t5_1_0": (t5.t5_1_0, t5.SIZES_1_0),
    "t5_1_1": (t5.t5_1_1, t5.SIZES_1_1),
    "flan_t5": (t5.flan_t5, t5.SIZES_1_1),
    "mt5": (t5.mt5, t5.MT5_SIZES),
    "byt5": (t5.byt5, t5.BYT5_SIZES),
    "umt5": (t5.umt5, t5.UMT5_SIZES),
    "bart": (bart.bart, bart.SIZES),
    "transformer": (transformer.transformer, transformer.SIZES),
    "bert": (bert.bert, bert.SIZES),
    "gpt2": (gpt2.gpt2, gpt2.SIZES),
    "llama": (llama.llama, llama.SIZES),
    "deepseek_v2": (deepseek.deepseek_v2, deepseek.SIZES_V2),
    "deepseek_v3": (deepseek.deepseek_v3, deepseek.SIZES_V3),
    "mixtral": (mixtral.mixtral, mixtral.SIZES),
    "qwen3": (qwen3.qwen3, qwen3.SIZES),
    "roberta": (roberta.roberta, roberta.SIZES),
    "gemma2": (gemma2.gemma2, gemma2.SIZES),
    "distilbert": (distilbert.distilbert, distilbert.SIZES),
    "tinybert": (tinybert.tinybert, tinybert.SIZES),
    "albert": (albert.albert, albert.SIZES),
    "gemma3": (gemma3.gemma3, gemma3.SIZES),
    "phi3": (phi3.phi3, phi3.SIZES),
    "gpt3": (gpt3.gpt3, gpt3.SIZES),
    "modernbert": (modernbert.modernbert, modernbert.SIZES),
    "mobilebert": (mobilebert.mobilebert, mobilebert.SIZES),
}
MODELS = [
    f"models/{family}/{size}.gin" for family, (_, sizes) in FAMILIES.items() for size in sizes
]
MINI = "models/llama/mini.gin"  # a shape, not a size


def shipped(folder):
    return sorted(
        p.relative_to(cli.CONFIGS).as_posix() for p in (cli.CONFIGS / folder).rglob("*.gin")
    )


TASKS = [name for name in shipped("tasks") if name.count("/") == 1 and name != "tasks/base.gin"]
TEXTS = {"chitchat": "Chitchat", "my/*.txt": "Text", "a.jsonl": "JsonLines", "c4": "TFDS"}
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


SUPERVISED = {
    "classification": (["LABELS=['a','b','c']"], ("bert", "llama"), "Classification"),
    "regression": ([], ("bert", "llama"), "Regression"),
    "question_answering": ([], ("bert",), "SpanExtraction"),
    "bert_pretraining": ([], ("bert", "roberta"), "MaskedAndPairs"),
    "albert_pretraining": ([], ("albert",), "MaskedAndPairs"),
    "text_to_text": ([], ("t5_1_1", "llama"), "CrossEntropy"),
    "chat": ([], ("llama",), "CrossEntropy"),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_supervised_task_gives_any_run_its_head_and_loss(name):
    overrides, families, loss = SUPERVISED[name]
    for family in families:
        files = ["runs/pretrain_gpt.gin", f"tasks/{name}.gin", f"models/{family}/tiny.gin"]
        configure(TRAIN, files, overrides)
        model, task = value("HEADED"), value("TASK")
        task = task.for_family(model.kind)
        assert type(value("LOSS")).__name__ == loss
        assert type(model) is type(value("MODEL"))
        assert (model == value("MODEL")) == (loss == "CrossEntropy")
        batches = task.batches(batch_size=2, length=96, seed=0)
        task_free_of_data = dataclasses.replace(task, vocabulary=Bytes())
        loop.check_fit(model, task_free_of_data, batches, value("LOSS"))
        batch = {n: jax.ShapeDtypeStruct(*shape) for n, shape in batches.shapes.items()}
        params = parameters.abstract(model)[0]
        run = value("LOSS")
        sums = jax.eval_shape(
            lambda p, b, run=run, model=model: run(model_apply(model), p, None, b, None),
            params,
            batch,
        )
        assert list(sums.terms) == [*run.coefficients]


def test_every_size_of_every_preset_has_a_file():
    assert shipped("models") == sorted([*MODELS, MINI])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_is_the_preset_of_its_name(name):
    _, family, size = name.removesuffix(".gin").split("/")
    configure("t5x_lite.train.describe.describe", [name], model="%MODEL")
    model = value("MODEL")
    assert model == FAMILIES[family][0](size)
    if size == "tiny":  # nn/test_presets.py builds all other sizes, as presets
        shapes, _ = parameters.abstract(model)
        table = (model.physical_vocab, getattr(model.embedder, "width", None) or model.width)
        assert table in {leaf.shape for leaf in jax.tree.leaves(shapes)}


def test_mini_is_a_llama_of_another_shape():
    configure("t5x_lite.train.describe.describe", [MINI], model="%MODEL")
    shape = {"width": 128, "heads": 4, "kv_heads": 2, "hidden": 344}
    assert value("MODEL") == llama.llama("tiny", **shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_replace_each_other(family):
    files = [f"models/{family}/tiny.gin", f"models/{family}/large.gin"]
    files = [file for file in files if file in MODELS] or ["models/llama/13b.gin"]
    for order in (["models/llama/tiny.gin", *files], [*files, MINI, "models/llama/7b.gin"]):
        configure("t5x_lite.train.describe.describe", order, model="%MODEL")
        last, size = order[-1].removesuffix(".gin").split("/")[1:]
        assert value("MODEL") == FAMILIES[last][0](size)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TASKS)
def test_every_objective_takes_every_text(name, text):
    configure("t5x_lite.data.prepare.prepare", [name], [f"TEXT={text!r}"], task="%TASK")
    task = value("TASK")
    assert type(task.source).__name__ == TEXTS[text]
    assert task.name == {"my/*.txt": "my"}.get(text, text.removesuffix(".jsonl"))
    shapes = task.batches(batch_size=2, length=128, seed=0).shapes
    assert shapes["tokens"][0][0] == 2


def test_a_mixture_s_tasks_share_all_but_their_text():
    name = "tasks/mixtures/two_texts.gin"
    assert [n for n in shipped("tasks") if n.count("/") == 2] == [name]
    with pytest.raises(UserError, match="SECOND_TEXT has no value"):
        configure("t5x_lite.data.prepare.prepare", [name], task="%TASK")
    second = "SECOND_TEXT='my/*.txt'"
    configure(TRAIN, ["runs/pretrain_gpt.gin", name], [second])
    mixture = value("TASK")
    assert [type(task.source).__name__ for task in mixture.tasks()] == ["Chitchat", "Text"]
    assert [task.name for task in mixture.tasks()] == ["chitchat", "my"]
    assert mixture.rates({"chitchat": 1, "my": 1}) == [3, 1]
    assert len({(t.objective, t.vocabulary, t.vocabulary_dir) for t in mixture.tasks()}) == 1
    assert mixture.batches(batch_size=2, length=64, seed=0).shapes["tokens"][0] == (2, 64)


def test_the_objectives_differ():
    objectives = set()
    for name in TASKS:
        configure("t5x_lite.data.prepare.prepare", [name], task="%TASK")
        objectives.add(repr(value("TASK").objective))
    assert len(objectives) == len(TASKS) >= 7


VERBS = {
    "t5x_lite.data.prepare.prepare",
    "t5x_lite.data.prepare.train_tokenizer",
    "t5x_lite.data.show.show",
    "t5x_lite.train.describe.describe",
    "t5x_lite.train.loop.train",
    "t5x_lite.evaluate.loss.evaluate",
    "t5x_lite.serve.generate.generate",
}
TRAIN = "t5x_lite.train.loop.train"
MACROS = {"STEPS", "BATCH_SIZE", "LENGTH", "SEED", "LEARNING_RATE"}
MACROS |= {"EVAL_PERIOD", "CHECKPOINT_PERIOD", "MICROBATCHES"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_can_be_traced_from_its_batch_to_its_update(name):
    configure(TRAIN, [name])
    model, task, optimizer = value("HEADED"), value("TASK"), value("OPTIMIZER")
    task = task.for_family(model.kind)
    assert task.vocabulary.vocab_size <= model.vocab_size
    batches = task.batches(batch_size=value("BATCH_SIZE"), length=value("LENGTH"), seed=0)
    batch = {n: jax.ShapeDtypeStruct(shape, dtype) for n, (shape, dtype) in batches.shapes.items()}
    transform = optimizer.build(parameters.abstract(model)[1])
    step = make_train_step(
        model_apply(model), value("LOSS"), transform, optimizer.schedule, value("MICROBATCHES")
    )
    state, key = jax.eval_shape(lambda: (init_state(model, transform, 0), jax.random.key(0)))
    after, metrics = jax.eval_shape(step, state, batch, key)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_serves_every_verb_and_reads_the_same_macros(name):
    for target in VERBS:
        configure(target, [name])
    read = set(cli.macros_read())
    assert read >= MACROS | {"MODEL", "TASK", "VOCAB_SIZE", "DATA_DIR", "OPTIMIZER"}
    configure(TRAIN, [name], [f"{macro}=40" for macro in MACROS])
    assert {value(macro) for macro in MACROS} == {40}
    assert value("OPTIMIZER").schedule(39) <= 40, "40 steps are enough for the schedule"


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_stores_describes_the_same_run(name, tmp_path):
    configure(TRAIN, [name])
    macros = sorted(set(cli.macros_read()) - {"OPTIMIZER"})  # schedules are functions
    before = {macro: value(macro) for macro in macros}
    (tmp_path / "config.gin").write_text(gin.config_str())
    configure(TRAIN, [str(tmp_path / "config.gin")])
    assert {macro: value(macro) for macro in macros} == before


@pytest.mark.parametrize("name", RUNS)
def test_a_run_says_how_to_run_it_and_what_came_out(name):
    lines = (cli.CONFIGS / name).read_text().splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    assert f"t5x_lite train --gin_file {name}" in head
    assert "ot run" in head or "measured" in head.lower()


def test_another_model_and_task_replace_the_run_s():
    replaced = ["runs/pretrain_gpt.gin", "tasks/masked_lm.gin", "models/bert/base.gin"]
    configure(TRAIN, replaced, ["STEPS=5", "WARMUP_STEPS=2", "AdamW.weight_decay=0.5"])
    assert value("MODEL") == bert.bert("base")
    assert value("TASK").objective.families == ("encoder-only",)
    assert isinstance(value("OPTIMIZER"), optim.AdamW)
    assert value("OPTIMIZER").weight_decay == 0.5


def test_a_base_puts_the_run_s_optimizer_under_mup():
    def optimizer():
        return copy.deepcopy(gin.config._CONFIG[("", TRAIN)]["optimizer"])

    configure(TRAIN, ["runs/pretrain_gpt.gin"])
    assert isinstance(optimizer(), optim.AdamW)
    narrow = ["MUP_BASE=@base/gpt2.gpt2()", "base/gpt2.gpt2.size='tiny'", "base/gpt2.gpt2.width=32"]
    configure(TRAIN, ["runs/pretrain_gpt.gin"], narrow)
    assert isinstance(optimizer(), optim.MuP)
    assert optimizer().model == value("HEADED") == gpt2.gpt2("tiny")
    assert optimizer().base == gpt2.gpt2("tiny", width=32)


CURATE = "t5x_lite.data.curate.curate"
EXECUTORS = {"curate/slurm.gin": "Slurm", "curate/ray.gin": "Ray"}
CURATIONS = [n for n in shipped("curate") if n != "curate/base.gin" and n not in EXECUTORS]
NEEDED = {"curate/decontaminate.gin": ["EVALUATION='my/test.jsonl'"]}


def curation(files, overrides=()):
    """What `curate` would be called with, built."""
    configure(CURATE, files, overrides)
    return {
        name: copy.deepcopy(bound)
        for name, bound in gin.config._CONFIG[("", "t5x_lite.data.curate.curate")].items()
    }


@pytest.mark.parametrize("name", CURATIONS)
def test_a_curation_builds_its_rules_for_any_text(name):
    for text, source in TEXTS.items():
        bound = curation([name], [f"TEXT={text!r}", "OUT='my/clean'", *NEEDED.get(name, [])])
        assert type(bound["source"]).__name__ == source
        assert bound["out"] == "my/clean"
        assert len({rule.title for rule in curate_run.flat(bound["rules"])}) >= 1


@pytest.mark.parametrize("name", CURATIONS)
def test_a_curation_says_how_to_run_it_and_what_came_out(name):
    lines = (cli.CONFIGS / name).read_text().splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    assert f"t5x_lite data curate --gin_file {name}" in head
    assert "measured" in head.lower()


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_executor_replaces_the_local_one(name):
    overrides = ["PARTITION='cpu'"] if "slurm" in name else []
    assert (
        type(curation(["curate/web.gin", name], overrides)["executor"]).__name__
        == (EXECUTORS[name])
    )


def test_the_published_recipes_have_their_numbers():
    language, repetition, quality, lines, own, near, masked = curate_run.flat(
        curation(["curate/fineweb.gin"])["rules"]
    )
    assert (language.languages, language.threshold) == (("en",), 0.65)
    assert repetition == curate.GopherRepetition()
    assert quality == curate.GopherQuality()
    assert lines == curate.C4Quality(terminal_punctuation=False)
    assert own == curate.FineWebQuality()
    assert (near.ngram, near.buckets, near.hashes_per_bucket) == (5, 14, 8)
    assert masked == curate.MaskPersonalData()
    titles = [rule.title for rule in curate_run.flat(curation(["curate/c4.gin"])["rules"])]
    assert titles == ["Length", "Language", "C4Quality", "BadWords", "ExactDuplicates"]
