"""Approach 1 finds which size wins at which compute, from curves and from single runs."""

import json

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.scaling import envelope, fit, frontier, laws, optimum, points
from t5x_lite.scaling.points import Points

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
ONE = {name: np.array([value]) for name, value in TRUE.items()}


def curves(sizes=25, rows=40):
    n = np.repeat(np.geomspace(1e7, 1e10, sizes), rows)
    d = n * np.tile(np.geomspace(0.5, 2000, rows), sizes)
    columns = {"n": n, "d": d, "c": 6 * n * d, "run": np.repeat(np.arange(sizes), rows)}
    columns["loss"] = laws.CHINCHILLA.predict(TRUE, columns)
    return columns


def test_curves_give_the_laws_exponents_and_optimum():
    found = envelope.fit(curves(), bootstraps=20)
    a = TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"])
    assert found.curves == 25
    assert found.parameters["a"] == pytest.approx(a, abs=0.01)
    assert found.parameters["b"] == pytest.approx(1 - a, abs=0.01)
    assert found.samples["a"].std() > 0
    for c in (1e19, 1e20):
        n = found.parameters["G"] * c ** found.parameters["a"]
        assert n == pytest.approx(optimum.best_size(ONE, c)[0], rel=0.05)
        loss = found.parameters["E"] + found.parameters["F"] * c ** -found.parameters["gamma"]
        at = {"n": np.array([n]), "d": np.array([c / (6 * n)])}
        assert loss == pytest.approx(laws.CHINCHILLA.predict(TRUE, at)[0], rel=2e-3)
    assert found.n.min() > 1.01e7  # where the smallest or the largest wins, nothing is known
    assert found.n.max() < 0.99e10


def test_without_runs_rows_of_one_size_are_a_curve_and_others_their_own():
    columns = curves(9, 12)
    whole = envelope.fit(columns)
    del columns["run"]
    assert envelope.fit(columns).parameters == whole.parameters
    rng = np.random.default_rng(0)
    columns["n"] = columns["n"] * np.exp(0.01 * rng.standard_normal(len(columns["n"])))
    columns["c"] = 6 * columns["n"] * columns["d"]
    columns["loss"] = laws.CHINCHILLA.predict(TRUE, columns)
    alone = envelope.fit(columns, bootstraps=3)
    assert alone.curves == 0
    assert alone.parameters["a"] == pytest.approx(whole.parameters["a"], abs=0.1)
    lowest = np.minimum.accumulate(alone.loss)
    np.testing.assert_array_equal(alone.loss, lowest)


def test_budgets_of_single_runs_have_one_winner_each_between_two_others():
    c = np.repeat([1e18, 1e19, 1e20, 1e21], 7)
    best = np.concatenate([optimum.best_size(ONE, each) for each in c])
    n = best * np.tile(np.geomspace(0.3, 3, 7), 4) * np.where(c == 1e20, 4, 1)
    c = c * np.tile(np.linspace(0.97, 1.03, 7), 4)  # not counted alike
    columns = {"n": n, "d": c / (6 * n), "c": c}
    columns["loss"] = laws.CHINCHILLA.predict(TRUE, columns)
    found = envelope.fit(columns)
    assert found.n.tolist() == pytest.approx(n[[3, 10, 24]])  # 1e20's lowest is its smallest
    assert found.parameters["a"] == pytest.approx(0.28 / 0.62, abs=1e-3)


def test_too_few_curves_or_winners_are_refused_with_their_number():
    two = {name: values[:80] for name, values in curves().items()}
    with pytest.raises(UserError, match=r"2 runs have two rows or more, .* needs 3"):
        envelope.fit(two)
    short = curves(4, 40)
    keep = short["d"] < 5 * short["n"]  # the largest never wins, nor does one between
    with pytest.raises(UserError, match=r"[01] sizes win at some compute among 4 curves"):
        envelope.fit({name: values[keep] for name, values in short.items()})


def test_the_lowest_losses_power_is_found_in_every_row():
    log_c = np.log(np.geomspace(1e18, 1e22, 9))[None].repeat(3, 0)
    true = [(1.7, 3e3, 0.16), (0.0, 30.0, 0.05), (2.0, 1e7, 0.4)]
    loss = np.stack([e + f * np.exp(-g * log_c[0]) for e, f, g in true])
    loss[2, 4:] = np.nan
    found = frontier.fit(log_c, loss)
    for row, (e, f, g) in enumerate(true):
        assert found["gamma"][row] == pytest.approx(g, rel=1e-2)
        assert found["E"][row] == pytest.approx(e, abs=2e-2)
        assert found["F"][row] == pytest.approx(f, rel=0.2)
    loss[0, 3:] = np.nan  # three points
    assert np.isnan(frontier.fit(log_c, loss)["E"]).tolist() == [True, False, False]


def test_rows_before_the_end_belong_to_the_envelope_alone(tmp_path):
    """A run's last row is its result; runs that have not ended are left out and counted."""
    columns = curves(6, 8)
    rows = [
        {"id": f"r{run}", "n": n, "d": d, "loss": loss, "final": bool(d > 1999 * n and run != 2)}
        for n, d, loss, run in zip(*(columns[k] for k in ("n", "d", "loss", "run")), strict=True)
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    names = {"n": "n", "d": "d", "run": "id", "final": "final"}
    found = points.read(str(path), **names)
    assert (len(found), found.unfinished, len(found.curves["loss"])) == (5, 1, 40)
    np.testing.assert_array_equal(found.columns["d"], 2000 * found.columns["n"])
    del names["final"]  # the last row of every run counts
    found = points.read(str(path), **names)
    assert (len(found), found.unfinished, len(found.curves["loss"])) == (6, 0, 48)
    result = fit.fit(found, bootstraps=5, only=["approach_1"])
    method = result["methods"]["approach_1"]
    assert method["curves"] == 6
    assert {"n_exponent", "d_exponent", "optimum", "frontier"} <= method.keys()
    rows.append({**rows[7], "loss": 9.0})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match=r"both the end of one run"):
        points.read(str(path), **names)


def test_a_run_of_one_row_is_its_own_result():
    columns = curves(8, 12)
    del columns["run"]
    result = fit.fit(Points(columns), bootstraps=0, only=["approach_1"])
    assert result["methods"]["approach_1"]["curves"] == 8
