"""Runs that are held out are predicted, noise of seeds is told from runs', and methods compared."""

import functools

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.scaling import agreement, fit, isoflop, laws, optimum, validation
from t5x_lite.scaling.points import Points

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
ONE = {name: np.array([value]) for name, value in TRUE.items()}
FITS = {"approach_3": functools.partial(laws.fit, laws.CHINCHILLA, starts=10)}


TIED = {**TRUE, "beta": TRUE["alpha"]}  # where a parabola has no bias


def budgets(noise=0.0, seed=0, off_centre=1.0, seeds=1, computes=5, true=TRUE):
    c = np.repeat(np.geomspace(1e18, 1e20, computes), 7 * seeds)
    one = {name: np.array([value]) for name, value in true.items()}
    best = np.concatenate([optimum.best_size(one, each) for each in c])
    n = best * off_centre * np.tile(np.repeat(np.geomspace(0.25, 4, 7), seeds), computes)
    columns = {"n": n, "c": c, "d": c / (6 * n)}
    errors = noise * np.random.default_rng(seed).standard_normal(len(n))
    columns["loss"] = laws.CHINCHILLA.predict(true, columns) * np.exp(errors)
    if seeds > 1:
        columns["seed"] = np.tile(np.arange(seeds), 7 * computes)
    return columns


def test_the_largest_budgets_are_held_out():
    c = budgets()["c"]
    assert np.flatnonzero(validation.held_out(c)).tolist() == list(range(28, 35))
    assert np.flatnonzero(validation.held_out(c, 2)).tolist() == list(range(21, 35))
    with pytest.raises(UserError, match=r"5 budgets can't be held out: the runs have 5"):
        validation.held_out(c, 5)
    alone = np.geomspace(1e18, 1e21, 30)  # a tenth of the runs, each a budget
    assert validation.held_out(alone).sum() == 3


def test_predictions_of_what_was_held_out_and_their_intervals():
    exact = budgets()
    out = validation.held_out(exact["c"])
    found = validation.check(FITS, exact, out, bootstraps=0)
    assert found["methods"]["approach_3"]["predicted"] == pytest.approx(exact["loss"][out])
    assert found["methods"]["approach_3"]["rms_error"] < 1e-6
    assert found["times"] == pytest.approx(100**0.25)
    inside = []
    for seed in range(8):
        columns = budgets(0.01, seed)
        method = validation.check(FITS, columns, out, bootstraps=60, seed=seed)["methods"]
        inside.append(method["approach_3"]["inside"])
        assert 0.003 < method["approach_3"]["rms_error"] < 0.05
    assert np.mean(inside) > 0.85  # of 56 predictions at 95%
    wrong = {**columns, "loss": np.where(out, 1.1 * columns["loss"], columns["loss"])}
    method = validation.check(FITS, wrong, out, bootstraps=60)["methods"]["approach_3"]
    assert method["inside"] < 0.3
    assert method["mean_error"] == pytest.approx(-0.09, abs=0.03)


def test_minima_of_what_was_held_out():
    columns = budgets()
    out = validation.held_out(columns["c"], 2)
    found = validation.check_minima(columns, out, "parabola", bootstraps=10)
    assert [row["c"] for row in found] == pytest.approx(np.unique(columns["c"])[-2:])
    for row in found:
        assert row["n"] == pytest.approx(optimum.best_size(ONE, row["c"])[0], rel=0.03)
        assert row["predicted_n"]["value"] == pytest.approx(row["n"], rel=0.03)
        assert "predicted_loss" not in row  # three budgets are too few for its power
    out = validation.held_out(columns["c"])
    (row,) = validation.check_minima(columns, out, "parabola", bootstraps=10)
    assert row["predicted_loss"]["value"] == pytest.approx(row["loss"], rel=2e-3)
    assert len(row["predicted_loss"]["interval"]) == 2
    with pytest.raises(UserError, match=r"1 of 1 budgets have a minimum"):
        validation.check_minima(columns, validation.held_out(columns["c"], 4), "parabola")


def test_the_fit_reports_the_check():
    only = ["approach_3", "kaplan_nd", "approach_2_parabola"]
    result = fit.fit(Points(budgets(0.005)), bootstraps=20, only=only)
    assert result["validation"]["rows"] == list(range(28, 35))
    assert len(result["validation"]["minima"]["approach_2_parabola"]) == 1
    assert result["validation"]["methods"].keys() == {"approach_3", "kaplan_nd"}
    with pytest.raises(UserError, match=r"7 budgets can't be held out"):
        fit.fit(Points(budgets(0.005)), bootstraps=0, only=["approach_3"], holdout=7)


def test_noise_of_seeds_is_what_it_was_and_gives_intervals_of_its_own():
    columns = budgets(0.01, seeds=3, computes=3)
    names = ["approach_3", "variable_projection", "approach_2_parabola"]
    result = fit.fit(Points(columns), bootstraps=60, only=names, holdout=0)
    assert result["noise"]["of"] == "seeds"
    assert result["noise"]["log_loss"] == pytest.approx(0.01, rel=0.25)
    for method in result["methods"].values():
        low, high = method["n_exponent"]["interval"]
        noise_low, noise_high = method["n_exponent"]["noise_interval"]
        assert 0.3 < (noise_high - noise_low) / (high - low) < 3
    one = fit._draws(columns, 50, 0, 1e-3, None).weights
    group = np.repeat(np.arange(21), 3)
    np.testing.assert_array_equal(one, one[:, ::3][:, group])  # seeds of a run stay together
    del columns["seed"]
    with pytest.raises(UserError, match=r"--seed_column"):
        fit.fit(Points(columns), bootstraps=5, noise="seeds")
    names = ["kaplan_nd", "approach_2_akima"]
    result = fit.fit(Points(columns), bootstraps=20, only=names, noise="residuals", holdout=0)
    assert result["noise"] == {"of": "residuals"}
    assert "noise_interval" in result["methods"]["kaplan_nd"]["parameters"]["alpha_N"]
    columns["seed"] = np.arange(63.0)
    columns["n"] = columns["n"] * np.geomspace(1, 1.2, 63)
    with pytest.raises(UserError, match=r"no two runs differ in seed alone"):
        fit.fit(Points(columns), bootstraps=5, noise="seeds")


def test_methods_that_part_beyond_their_intervals_are_named():
    def method(n, low, high):
        return {"optimum": {"c": 1e20, "n": {"value": n, "interval": [low, high]}}}

    methods = {"a": method(1e9, 0.9e9, 1.1e9), "b": method(3e9, 2.5e9, 3.5e9)}
    found = agreement.compare(methods, budgets(), 6.0)
    assert found["spread"]["n"] == pytest.approx(3)
    assert "a says at most 1.1e+09, b at least 2.5e+09" in found["remarks"][0]
    methods["b"] = method(1.2e9, 1.0e9, 1.4e9)
    assert agreement.compare(methods, budgets(), 6.0)["remarks"] == []
    assert agreement.compare({"c": {}}, budgets(), 6.0) is None


def test_a_biased_grid_is_said_with_its_bias():
    names = ["approach_3", "approach_2_parabola"]

    def remarks(off_centre):
        columns = budgets(off_centre=off_centre)
        result = fit.fit(Points(columns), bootstraps=0, only=names, holdout=0, target=1e21)
        method = result["methods"]["approach_2_parabola"]["optimum"]
        return result["comparison"]["remarks"], method["n"]["value"]

    found, n = remarks(2.5)
    error = n / optimum.best_size(ONE, 1e21)[0] - 1
    assert f"{error:+.1%} off" in found[0]
    assert "approach_2_parabola is biased" in found[0]
    assert "α 0.34, β 0.28" in found[0]
    columns = budgets(true=TIED)
    result = fit.fit(Points(columns), bootstraps=0, only=names, holdout=0, target=1e21)
    assert result["comparison"]["remarks"] == []  # centred, and α = β


def test_the_minimas_losses_give_the_loss_at_a_target():
    found = isoflop.fit(budgets(), bootstraps=3)
    lowest = {name: float(values[0]) for name, values in found.lowest.items()}
    best = optimum.best_size(ONE, 1e20)
    true = laws.CHINCHILLA.predict(TRUE, {"n": best, "d": 1e20 / (6 * best)})[0]
    assert lowest["E"] + lowest["F"] * 1e20 ** -lowest["gamma"] == pytest.approx(true, rel=0.01)
    assert len(found.lowest_samples["E"]) == 3
