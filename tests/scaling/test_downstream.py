"""Accuracy follows the loss by a sigmoid, and compute through a law."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from t5x_lite.errors import UserError
from t5x_lite.scaling import downstream, fit, laws
from t5x_lite.scaling.points import Points

LAW = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
TRUE = {"floor": 0.25, "ceiling": 0.9, "slope": 4.0, "middle": 2.6}


def runs(noise=0.0, seed=0):
    n = np.repeat(np.geomspace(1e7, 1e10, 6), 5)
    d = n * np.tile(np.geomspace(5, 200, 5), 6)
    rng = np.random.default_rng(seed)
    columns = {"n": n, "d": d, "c": 6 * n * d}
    loss = laws.CHINCHILLA.predict(LAW, columns)
    columns["loss"] = loss * np.exp(0.1 * noise * rng.standard_normal(len(n)))
    columns["accuracy"] = downstream.accuracy(TRUE, loss) + noise * rng.standard_normal(len(n))
    return columns


def test_the_sigmoid_comes_back_with_and_without_known_chance():
    columns = runs()
    assert downstream.fit(columns, chance=0.25).parameters == pytest.approx(TRUE, rel=1e-4)
    assert downstream.fit(columns).parameters == pytest.approx(TRUE, rel=1e-3)


def test_least_squares_as_scipys():
    columns = runs(0.01)

    def sigmoid(loss, ceiling, slope, middle):
        return 0.25 + (ceiling - 0.25) / (1 + np.exp(slope * (loss - middle)))

    expected, _ = curve_fit(sigmoid, columns["loss"], columns["accuracy"], p0=(0.8, 3.0, 2.5))
    found = downstream.fit(columns, chance=0.25).parameters
    assert [found[k] for k in ("ceiling", "slope", "middle")] == pytest.approx(expected, rel=1e-4)


def test_accuracy_at_a_target_with_its_interval():
    columns = runs(0.005)
    columns["accuracy"][::4] = np.nan  # not measured there
    result = fit.fit(
        Points(columns), target=1e23, bootstraps=60, only=["approach_3", "downstream"],
        chance=0.25, holdout=0,
    )  # fmt: skip
    found = result["downstream"]
    assert found["loss_by"] == "approach_3"
    best = found["optimum"]["accuracy"]
    n = np.geomspace(1e9, 1e12, 4001)
    loss = laws.CHINCHILLA.predict(LAW, {"n": n, "d": 1e23 / (6 * n)}).min()
    true = downstream.accuracy(TRUE, loss)
    low, high = best["interval"]
    assert low < true < high
    assert high - low < 0.1
    curve = found["frontier"]
    assert len(curve["c"]) == len(curve["accuracy"]["value"]) == len(curve["accuracy"]["low"])
    assert np.all(np.diff(curve["accuracy"]["value"]) > 0)
    assert result["columns"]["accuracy"][0] is None


def test_a_ceiling_that_is_far_away_is_not_identified():
    columns = runs()
    columns["accuracy"] = downstream.accuracy({**TRUE, "middle": 1.0}, columns["loss"])
    assert "ceiling" in downstream.fit(columns, chance=0.25).weak


@pytest.mark.parametrize(
    ("rows", "chance", "message"),
    [
        (3, 0.25, r"3 parameters, and there are 3 losses .* at least 4"),
        (30, 0.95, r"chance=0.95 must be .* below the best accuracy, 0.8"),
    ],
)
def test_too_few_losses_or_a_chance_above_all(rows, chance, message):
    columns = {name: values[:rows] for name, values in runs().items()}
    with pytest.raises(UserError, match=message):
        downstream.fit(columns, chance=chance)
