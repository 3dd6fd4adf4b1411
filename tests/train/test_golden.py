"""A state that an earlier version wrote loads under today's names and computes the same."""

import dataclasses
import pathlib
import runpy

import jax
import numpy as np
import pytest

from t5x_lite.checkpoint import Checkpointer
from t5x_lite.nn import parameters
from t5x_lite.partitioning import MeshConfig, Sharding
from t5x_lite.train.restore import restore_params
from t5x_lite.train.state import from_tree, init_state, stored_shapes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
STATES = sorted(path.name for path in GOLDEN.glob("state_*"))


@pytest.fixture(scope="module")
def made():
    return runpy.run_path(str(GOLDEN / "make_state.py"))


@pytest.mark.parametrize("name", STATES)
def test_parameters_mean_what_they_meant(made, name):
    params, step = restore_params(made["MODEL"], str(GOLDEN / name))
    assert step == 1
    np.testing.assert_allclose(
        made["logits"](params), np.load(GOLDEN / name / "logits.npy"), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", STATES)
def test_the_whole_state_loads(made, name, scan):
    model = dataclasses.replace(made["MODEL"], scan=scan)
    optimizer, sharding = made["OPTIMIZER"], Sharding(MeshConfig().build(jax.devices()[:1]))
    with Checkpointer(GOLDEN / name / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(stored_shapes(model, optimizer, sharding))
    transform = optimizer.build(parameters.abstract(model)[1])
    like = jax.eval_shape(lambda: init_state(model, transform, 0))
    state = from_tree(restored.tree, like)
    assert jax.tree.map(np.shape, state) == jax.tree.map(lambda leaf: leaf.shape, like)


def test_there_is_one_of_each_format():
    from t5x_lite.checkpoint import FORMAT

    assert [f"state_{number}" for number in range(1, FORMAT + 1)] == STATES
