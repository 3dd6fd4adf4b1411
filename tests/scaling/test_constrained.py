"""What repeated tokens are worth comes back from simulated runs, or it is said why it can't."""

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.scaling import constrained, curved, fit, laws, optimum
from t5x_lite.scaling.constrained import CONSTRAINED
from t5x_lite.scaling.points import Points

# Muennighoff et al. 2023, §5 and appendix A; they give α = β.
TRUE = {
    "A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.353, "beta": 0.353, "R_D": 15.39, "R_N": 5.31,
}  # fmt: skip


def runs(noise=0.0):
    n, unique, epochs = (
        a.ravel() for a in np.meshgrid([1e8, 6e8, 3e9, 8e9], [1e8, 1.5e9, 2e10], [1, 4, 15, 50.0])
    )
    columns = {"n": n, "d": unique * epochs, "unique": unique, "c": 6 * n * unique * epochs}
    exact = CONSTRAINED.predict(TRUE, columns)
    errors = noise * np.random.default_rng(0).standard_normal(len(n))
    return columns | {"loss": exact * np.exp(errors)}


def by_hand(true, n, d, unique):
    """One run's loss as the paper writes it."""
    a, b, e, alpha, beta, r_d, r_n = (
        true[k] for k in ("A", "B", "E", "alpha", "beta", "R_D", "R_N")
    )
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    best = min(n, (unique * g) ** (beta / alpha) * g)
    size = best + best * r_n * (1 - np.exp(-(n / best - 1) / r_n))
    data = unique + unique * r_d * (1 - np.exp(-(d / unique - 1) / r_d))
    return e + a / size**alpha + b / data**beta


def test_the_law_is_the_papers():
    columns, other = runs(), {**TRUE, "beta": 0.4}
    for true in (TRUE, other):
        rows = zip(columns["n"], columns["d"], columns["unique"], strict=True)
        losses = CONSTRAINED.predict(true, columns)
        assert losses == pytest.approx([by_hand(true, *row) for row in rows], rel=1e-12)
    # The example of the authors' README (huggingface/datablations), with its own digits.
    logs = {"A": 6.255414, "B": 7.3049974, "E": 0.6254804}
    exact = {name: float(np.exp(log)) for name, log in logs.items()}
    exact |= {"alpha": 0.3526596, "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743}
    at = {"n": np.array([6.34e9, 8.67e9]), "d": np.array([242e9, 178e9])}
    losses = CONSTRAINED.predict(exact, {**at, "unique": np.array([25e9, 25e9])})
    assert losses == pytest.approx([2.2256440889984477, 2.2269634075087867], rel=1e-12)


def test_published_worth_of_repeats_and_of_spare_parameters_comes_back():
    for law in (CONSTRAINED, constrained.TIED):
        expected = {name: TRUE[name] for name in law.parameters}
        found = curved.fit(law, runs(), starts=10).parameters
        assert found == pytest.approx(expected, rel=1e-4)
    result = fit.fit(Points(runs(0.002)), bootstraps=40, only=["data_constrained"], holdout=0)
    found = result["methods"]["data_constrained"]
    for name in ("R_D", "R_N"):
        low, high = found["parameters"][name]["interval"]
        assert low < TRUE[name] < high
        assert high < 2 * low
    assert "not_identified" not in found


def test_what_repeats_do_not_identify_is_named():
    columns = runs()
    once = {name: values[columns["d"] <= columns["unique"]] for name, values in columns.items()}
    fitted = curved.fit(CONSTRAINED, once, starts=4)
    assert constrained.not_identified(fitted, once)["R_D"] == "no run repeats its tokens"
    assert {"R_D", "R_N"} & fitted.weak.keys()
    small = {name: values[columns["n"] < 2e8] for name, values in columns.items()}
    found = constrained.not_identified(
        laws.Fitted(CONSTRAINED, TRUE, 0.0), {**small, "unique": np.full(12, 1e13)}
    )
    assert found == {
        "R_D": "no run repeats its tokens",
        "R_N": "no run is larger than the best size for its unique tokens",
    }


def test_laws_that_know_no_repeats_are_fitted_to_fresh_runs_alone():
    columns = runs()
    few = {name: values[columns["n"] > 5e9] for name, values in columns.items()}
    with pytest.raises(UserError, match=r"5 parameters, and there are 3 points"):
        fit.fit(Points(few), bootstraps=0, only=["approach_3"])
    result = fit.fit(Points(columns), bootstraps=4, only=["approach_3"], holdout=0)
    rows = result["methods"]["approach_3"]["rows"]
    np.testing.assert_array_equal(columns["d"][rows], columns["unique"][rows])


def test_few_unique_tokens_call_for_a_smaller_model_than_many():
    one = {name: np.array([[value]]) for name, value in TRUE.items()}
    c = np.array([1e22])
    free = optimum.of_law(CONSTRAINED, 6.0)(one, c)
    held = optimum.of_law(CONSTRAINED, 6.0, unique=1e10)(one, c)
    assert free["n"] == pytest.approx(optimum.best_size(one, c))
    n = np.geomspace(1e8, 1e12, 20_001)
    at = {"n": n, "d": 1e22 / (6 * n), "unique": np.minimum(1e10, 1e22 / (6 * n))}
    loss = CONSTRAINED.predict(TRUE, at)
    assert held["n"][0, 0] == pytest.approx(n[np.argmin(loss)], rel=2e-3)
    assert held["loss"][0, 0] > free["loss"][0, 0]
    assert held["n"][0, 0] < free["n"][0, 0]
