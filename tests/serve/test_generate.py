import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.checkpoint import Checkpointer
from t5x_lite.data.objectives import CausalLM, MaskedLM, PrefixLM, SpanCorruption
from t5x_lite.data.sources import Text
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.decode.generate import Generated
from t5x_lite.decode.prompts import right_pad
from t5x_lite.errors import UserError
from t5x_lite.nn import parameters
from t5x_lite.nn.presets.bert import bert
from t5x_lite.nn.presets.gpt2 import gpt2
from t5x_lite.nn.presets.llama import llama
from t5x_lite.nn.presets.t5 import t5_1_1
from t5x_lite.partitioning import MeshConfig
from t5x_lite.serve import answers
from t5x_lite.serve import generate as serve_generate
from t5x_lite.serve.generate import generate
from t5x_lite.train.identity import model_identity

VOCABULARY = Bytes(extra_ids=5)
FAMILIES = {
    "llama": (llama, CausalLM()),
    "prefix": (llama, PrefixLM()),
    "gpt2": (gpt2, CausalLM()),
    "t5": (t5_1_1, SpanCorruption()),
    "bert": (bert, MaskedLM()),
}


def config(name):
    preset, objective = FAMILIES[name]
    task = Task(name, source=Text("none.txt"), vocabulary=VOCABULARY, objective=objective)
    return {"model": preset("tiny", vocab_size=VOCABULARY.size), "task": task}


@functools.cache
def params_of(name):
    """NumPy's, which need no program; large enough for an answer to depend on its prompt."""
    shapes, _ = parameters.abstract(config(name)["model"])
    rng = np.random.default_rng(0)

    def value(path, leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(1 + noise if path[-1].key == "scale" else noise)

    return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run's folder: parameters, and the memory of an optimizer, which isn't to be read."""
    folder, parts = tmp_path_factory.mktemp("run"), config("llama")
    vocabulary = parts["task"].load_vocabulary().fingerprint
    meta = {"model": model_identity(parts["model"]), "vocabulary": vocabulary, "ema": False}
    with Checkpointer(folder / "checkpoints") as checkpoints:
        tree = {"params": params_of("llama"), "opt_state": {"mu": jnp.ones(3)}}
        checkpoints.save(40, tree, meta)
    return str(folder)


@pytest.fixture
def in_memory(monkeypatch):
    """Parameters without a checkpoint: reading one compiles a digest for each of their shapes."""

    def restore(model, model_dir, step, sharding, vocabulary):
        _, axes = parameters.abstract(model)
        values = params_of(model_dir)
        where = jax.tree.map(lambda leaf, names: sharding.named(names, leaf.shape), values, axes)
        return jax.device_put(values, where), 40

    monkeypatch.setattr(serve_generate, "restore_params", restore)


def run(name, prompts, model_dir=None, **options):
    options = {"max_tokens": 6, "temperature": 1.0, "top_p": None} | options
    parts = config(name)
    return generate(**parts, model_dir=model_dir or name, prompts=prompts, **options)


PROMPTS = ["How are you?", "", "Longer than the rest"]


def test_a_checkpoint_answers_alike_on_any_mesh(run_dir, request):
    results = run("llama", PROMPTS[:2], run_dir)
    for answer, prompt in zip(results, PROMPTS, strict=False):
        assert answer.segments[0] == (prompt, False)
        assert answer.tokens == 6 or answer.stopped
        assert answer.logprob < 0
    request.getfixturevalue("in_memory")
    meshed = run("llama", PROMPTS[:2], mesh=MeshConfig(fsdp=2, tensor=4))
    assert [a.segments for a in meshed] == [a.segments for a in results]
    np.testing.assert_allclose([a.logprob for a in meshed], [a.logprob for a in results], rtol=1e-4)


@pytest.fixture
def writes(in_memory, monkeypatch):
    """Makes the model write what a function of (prompt, key) says: nothing is compiled."""
    batches = []

    def make(write):
        def generate(model, params, prompt, keys_B, decoding, banned_V):
            batches.append(prompt)
            rows = [
                write(tokens.tolist(), int(key))
                for tokens, key in zip(
                    prompt.get("encoder_tokens", prompt["tokens"]),
                    np.asarray(jax.random.key_data(keys_B)).sum(-1),
                    strict=True,
                )
            ]
            tokens_BT, lengths_B = right_pad(rows)["tokens"], np.array([len(row) for row in rows])
            stopped_B = np.array([row[-1] in decoding.stop_ids for row in rows])
            return Generated(tokens_BT, -1.0 * (tokens_BT > 0), lengths_B, stopped_B)

        monkeypatch.setattr(answers, "generate", generate)
        return batches

    return make


def test_samples_depend_on_seed_prompt_and_number_alone(writes, monkeypatch, capsys):
    monkeypatch.setattr(answers, "BATCH_ROWS", 4)

    def letters(row, key):
        return np.random.default_rng([key, *row]).integers(3 + 65, 3 + 91, 8).tolist()

    batches = writes(letters)
    results = run("llama", PROMPTS, num_samples=2)
    first = [answer.text for answer in results]
    assert len(set(first)) == 6
    assert [(a.prompt, a.sample) for a in results] == [(i, j) for i in range(3) for j in range(2)]
    shown = capsys.readouterr().out
    for answer in results:
        assert answer.segments[0] == (PROMPTS[answer.prompt], False)
        assert (answer.tokens, answer.stopped, answer.logprob) == (8, False, -8.0)
        head = f"--- prompt {answer.prompt + 1} of 3, sample {answer.sample + 1} of 2 ---"
        assert f"{head}\n{answer.text}\n" in shown
    others = run("llama", [PROMPTS[0], "another", PROMPTS[2]], num_samples=3)
    again = {(a.prompt, a.sample): a.text for a in others}
    assert [again[i, j] for i in (0, 2) for j in (0, 1)] == [*first[:2], *first[4:]]
    reseeded = run("llama", PROMPTS, num_samples=2, seed=1)
    assert not {a.text for a in reseeded} & set(first)
    # All batches have one shape: a second one would be another program to compile.
    assert {batch["tokens"].shape for batch in batches} == {(4, 32)}


def test_a_prefix_lm_reads_its_prompt_as_a_prefix(writes):
    batches = writes(lambda row, key: [3 + 65, 1])
    for name in ("prefix", "llama"):
        run(name, PROMPTS[:2])
    prefix, causal = batches
    np.testing.assert_array_equal(prefix["prefix"], prefix["segments"])
    assert "prefix" not in causal


def test_an_encoder_decoder_fills_the_sentinels_of_its_prompt(writes, capsys):
    vocabulary = config("t5")["task"].load_vocabulary()
    first, second = vocabulary.sentinel_ids[:2]
    spans = [first, *vocabulary.encode("cat"), second, *vocabulary.encode("here"), 1]
    writes(lambda row, key: spans)
    (answer,) = run("t5", ["The <extra_id_0> sat <extra_id_1>."])
    assert capsys.readouterr().out == "The cat sat here.\n"
    assert (answer.tokens, answer.stopped) == (len(spans), True)


def test_an_encoder_fills_masks_with_the_likeliest_candidates(in_memory):
    vocabulary = config("bert")["task"].load_vocabulary()
    names = [vocabulary.piece(i) for i in range(vocabulary.size)]
    results = run("bert", ["The <mask>at", "<mask> and <mask>"], top_k=4, num_samples=3)
    assert [len(a.candidates) for a in results] == [1, 2]
    for answer in results:
        new = [text for text, is_new in answer.segments if is_new]
        best = [candidates[0][0] for candidates in answer.candidates]
        assert new == [vocabulary.decode([names.index(piece)]) for piece in best]
        for candidates in answer.candidates:
            probs = [prob for _, prob in candidates]
            assert len(probs) == 4
            assert probs == sorted(probs, reverse=True)
            assert 0 < sum(probs) < 1


def refused(name, prompts, model_dir, **options):
    parts = config(name) | options
    with pytest.raises(UserError) as error:
        generate(model_dir=model_dir, prompts=prompts, **parts)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_too_little_memory_is_said_in_one_line(in_memory, monkeypatch):
    def exhaust(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(answers, "generate", exhaust)
    assert "12 + 99 tokens; lower max_tokens" in refused(
        "llama", ["eleven ids."], "llama", max_tokens=99
    )


def test_a_checkpoint_that_is_not_there_or_of_another_run_is_refused(run_dir, tmp_path):
    assert "no checkpoint" in refused("llama", ["a"], str(tmp_path / "none"))
    assert "step 7" in refused("llama", ["a"], run_dir, step=7)
    assert "holds another run" in refused("gpt2", ["a"], run_dir)
    task = config("llama")["task"]
    other = dataclasses.replace(task, vocabulary=Bytes(extra_ids=4))
    assert "bytes-5 → bytes-4" in refused("llama", ["a"], run_dir, task=other)
    larger = dataclasses.replace(task, vocabulary=Bytes(extra_ids=6))
    assert "269 ids and the model 268" in refused("llama", ["a"], run_dir, task=larger)


def test_prompts_and_options_that_cannot_work_are_refused_before_anything_is_read():
    assert "no prompt" in refused("llama", [], "none")
    assert "num_samples=0" in refused("llama", ["a"], "none", num_samples=0)
    assert "seed=-1" in refused("llama", ["a"], "none", seed=-1)
    assert "prompt 2 ('')" in refused("bert", ["<mask>", ""], "none")
    assert "character 2 isn't valid UTF-8" in refused("llama", ["a\udcff"], "none")
    message = refused("gpt2", ["a", "b" * 1000], "none", max_tokens=64)
    for number in ("prompt 2", "1001", "max_tokens=64", "1064", "1024", "to 24 or less"):
        assert number in message
