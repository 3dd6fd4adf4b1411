import dataclasses

import numpy as np
import pytest

from t5x_lite.data.objectives import CausalLM, MaskedLM
from t5x_lite.data.sources import Text
from t5x_lite.data.tasks import Task
from t5x_lite.data.vocabularies import Bytes
from t5x_lite.errors import UserError
from t5x_lite.evaluate.ngram import Bigram, baselines, score

SIZE = 12


def chain(count, seed, order=0.9):
    """Documents where token t is followed by (t + 1) mod 8 nine times in ten."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = [int(rng.integers(8))]
        while len(row) < 50:
            follows = rng.random() < order
            row.append((row[-1] + 1) % 8 if follows else int(rng.integers(8)))
        rows.append(np.array(row))
    return rows


def batch_of(rows):
    context = np.concatenate([row[:-1] for row in rows])
    target = np.concatenate([row[1:] for row in rows])
    return {"tokens": context, "targets": target, "weights": np.ones(len(target), np.float32)}


@pytest.fixture(scope="module")
def model():
    return Bigram.fit(chain(200, 0), SIZE)


def test_probabilities_sum_to_one_after_any_context(model):
    assert model.unigram.sum() == pytest.approx(1)
    for context in range(SIZE):  # 8 to 11 were never seen
        probabilities = model.probabilities(np.full(SIZE, context), np.arange(SIZE))
        assert probabilities.sum() == pytest.approx(1)
        assert (probabilities > 0).all()


def test_a_known_chain_is_scored_at_its_entropy(model):
    result = score(model, [batch_of(chain(400, 1))], np.ones(SIZE, int))
    follow, other = 0.9 + 0.1 / 8, 0.1 / 8
    entropy = -follow * np.log(follow) - 7 * other * np.log(other)
    assert result.bigram.nats_per_token == pytest.approx(entropy, rel=0.02)
    assert result.unigram.nats_per_token == pytest.approx(np.log(8), rel=0.01)
    assert result.bigram.tokens == 400 * 49
    assert result.bigram.bits_per_byte == pytest.approx(entropy / np.log(2), rel=0.02)


def test_interpolation_beats_either_part_where_counts_are_few():
    rows, unseen = chain(6, 0, order=0.5), [batch_of(chain(100, 1, order=0.5))]
    fitted = Bigram.fit(rows * 2, SIZE)
    mixed = score(fitted, unseen, np.ones(SIZE, int)).bigram.nats_per_token

    def only(weights):
        every = np.tile(np.array(weights, float), (len(fitted.weights), 1))
        one = dataclasses.replace(fitted, weights=every)
        return score(one, unseen, np.ones(SIZE, int)).bigram.nats_per_token

    assert mixed < only([0.999998, 1e-6, 1e-6])
    assert mixed < only([1e-6, 0.999998, 1e-6])


def test_only_weighted_targets_count(model):
    batch = batch_of(chain(5, 3))
    half = batch | {"weights": np.where(np.arange(len(batch["targets"])) % 2, 1, 0)}
    lengths = np.arange(SIZE)
    result = score(model, [half], lengths)
    assert result.bigram.tokens == len(batch["targets"]) // 2
    assert result.bigram.bytes == lengths[batch["targets"][1::2]].sum()
    with pytest.raises(UserError, match="no held-out target"):
        score(model, [batch | {"weights": np.zeros(len(batch["targets"]))}], lengths)


def test_a_tasks_baselines_count_all_held_out_bytes(tmp_path):
    from rich.console import Console

    from t5x_lite.data.prepare import prepare

    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} over the hills" for i in range(60)))
    source = Text(str(tmp_path / "a.txt"))
    task = Task("hills", source, Bytes(), CausalLM(), str(tmp_path), 0.2)
    prepare(task, Console(quiet=True))
    held_out = task.evaluation(batch_size=4, length=16)
    result = baselines(task, held_out)
    store = task.store("validation")
    total = store.lengths("text").sum()
    assert result.bigram.bytes == total
    assert result.bigram.tokens == total + len(store)  # and each document's end
    assert result.bigram.nats_per_token < result.unigram.nats_per_token < np.log(363)
    masked = dataclasses.replace(task, objective=MaskedLM())
    with pytest.raises(UserError, match="CausalLM only"):
        baselines(masked, held_out)
