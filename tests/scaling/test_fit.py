"""Laws are recovered from points that follow them, and figures stay those of an exact optimiser."""

import json

import numpy as np
import pytest
from scipy.optimize import check_grad, minimize

from t5x_lite.errors import UserError
from t5x_lite.scaling import fit, isoflop, laws, optimum, points, projection
from t5x_lite.scaling.points import Points

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}


def grid(noise=0.0, seed=0):
    n = np.repeat(np.geomspace(1e7, 1e10, 7), 6)
    d = n * np.tile(np.geomspace(2, 200, 6), 7)
    loss = laws.CHINCHILLA.predict(TRUE, {"n": n, "d": d})
    loss *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return {"n": n, "d": d, "c": 6 * n * d, "loss": loss}


@pytest.mark.parametrize("method", [lambda c: laws.fit(laws.CHINCHILLA, c), projection.fit])
def test_a_law_without_noise_is_found(method):
    found = method(grid()).parameters
    assert found == pytest.approx(TRUE, rel=1e-6)


def test_tied_exponents_are_one():
    columns = grid()
    columns["loss"] = laws.CHINCHILLA.predict({**TRUE, "beta": 0.34}, columns)
    expected = {name: value for name, value in TRUE.items() if name != "beta"}
    assert laws.fit(laws.TIED, columns).parameters == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("floor", [False, True])
@pytest.mark.parametrize("column", ["n", "d", "c"])
def test_powers_of_one_column(column, floor):
    law, columns = laws.of_one(column, floor), grid()
    true = {"A": 30.0, "alpha": 0.2} | ({"E": 1.5} if floor else {})
    columns["loss"] = law.predict(true, columns)
    assert laws.fit(law, columns).parameters == pytest.approx(true, rel=1e-6)


def test_sparse_models():
    n, d, density = (a.ravel() for a in np.meshgrid([1.0, 2, 4, 8], [1e3, 4e3, 9e3], [1, 0.5, 0.2]))
    true = {"a_S": 0.2, "c_S": 0.5, "a_D": 30.0, "c": 0.8, "b_S": 1.3, "b_N": 0.25, "b_D": 0.4}
    columns = {"n": n, "d": d, "density": density}
    columns["loss"] = laws.SPARSE.predict(true, columns)
    assert laws.fit(laws.SPARSE, columns, starts=30).parameters == pytest.approx(true, rel=1e-4)


def test_derivatives_of_the_objective():
    problem = laws._Problem(laws.CHINCHILLA, grid(0.05), delta=0.03)
    objective = problem.objective(None)
    rows, at = np.zeros(1, int), problem.starts(np.random.default_rng(0), 1)[0]

    def part(number):
        return lambda theta: objective(theta[None], rows)[number][0]

    assert check_grad(part(0), part(1), at) < 1e-5 * np.abs(part(1)(at)).max()
    for p, row in enumerate(part(2)(at)):
        slope = check_grad(lambda t, p=p: part(1)(t)[p], lambda t, row=row: row, at)
        assert slope < 1e-4 * np.abs(part(2)(at)).max()


def test_parameters_and_their_logarithms_are_inverse():
    problem = laws._Problem(laws.CHINCHILLA, grid(), delta=1e-3)
    again = problem.parameters(problem.theta(TRUE)[None])
    assert {name: v[0] for name, v in again.items()} == pytest.approx(TRUE, rel=1e-12)


def test_the_optimum_is_no_higher_than_that_of_scipy():
    columns = grid(0.03)
    ours = laws.fit(laws.CHINCHILLA, columns)
    problem = laws._Problem(laws.CHINCHILLA, columns, delta=1e-3)
    objective, rows = problem.objective(None), np.zeros(1, int)
    starts = problem.starts(np.random.default_rng(1), 3)
    values = [
        minimize(lambda t: objective(t[None], rows)[0][0], start, method="Nelder-Mead",
                 options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-9, "fatol": 1e-15}).fun
        for start in starts
    ]  # fmt: skip
    assert ours.objective <= min(values) * (1 + 1e-6)


def test_a_bootstrap_is_the_fit_of_its_draw():
    columns = grid(0.03)
    drawn = np.random.default_rng(5).integers(0, 42, 42)
    weights = np.bincount(drawn, minlength=42)[None]
    again = {name: v[drawn] for name, v in columns.items()}
    samples = laws.fit(laws.CHINCHILLA, columns, starts=20, weights=weights).samples
    alone = laws.fit(laws.CHINCHILLA, again, starts=20).parameters
    assert {name: v[0] for name, v in samples.items()} == pytest.approx(alone, rel=1e-3)
    # Those of least squares lie as far on the other side of what was found, a little farther.
    fitted = projection.fit(columns, weights=weights)
    alone = projection.fit(again).parameters
    for name, (sample,) in fitted.samples.items():
        found = fitted.parameters[name]
        expected = found * (found / alone[name]) ** np.sqrt(42 / 37)
        assert sample == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "method", [lambda c, **k: laws.fit(laws.CHINCHILLA, c, starts=5, **k), projection.fit]
)
def test_intervals_hold_the_truth_as_often_as_they_say(method):
    hits = dict.fromkeys(TRUE, 0)
    for seed in range(20):
        found = method(grid(0.01, seed), bootstraps=100, seed=seed)
        for name in TRUE:
            low, high = found.interval(name)
            hits[name] += low <= TRUE[name] <= high
    assert all(hit >= 15 for hit in hits.values()), hits  # of 95%, fewer come once in 3,000 times


def test_what_the_points_do_not_identify_is_named():
    columns = grid()
    columns["d"] = np.full_like(columns["d"], 1e9)  # one number of tokens: E and B are one
    columns["loss"] = laws.CHINCHILLA.predict(TRUE, columns)
    assert {"B", "E", "beta"} & laws.fit(laws.CHINCHILLA, columns).weak.keys()
    assert laws.fit(laws.CHINCHILLA, grid()).weak == {}


@pytest.mark.parametrize("curve", ["parabola", "akima"])
def test_minima_of_budgets_grow_as_the_law_says(curve):
    true = {**TRUE, "beta": TRUE["alpha"]}  # where the exponents agree a parabola has no bias
    one = {name: np.array([value]) for name, value in true.items()}
    c = np.repeat([1e18, 1e19, 1e20, 1e21], 13)
    n = np.array([optimum.best_size(one, each)[0] for each in c]) * np.tile(
        np.geomspace(0.2, 5, 13), 4
    )
    columns = {"n": n, "c": c, "d": c / (6 * n)}
    columns["loss"] = laws.CHINCHILLA.predict(true, columns)
    found = isoflop.fit(columns, curve, bootstraps=5)
    assert found.exponent == pytest.approx(0.5, abs=1e-3)
    assert found.optimum(1e20) == pytest.approx(optimum.best_size(one, 1e20)[0], rel=0.02)


def test_an_akima_curve_does_not_swing_between_sizes_that_all_but_agree():
    n = np.repeat(np.geomspace(1e8, 1e9, 7), 2) * np.tile([1, 1 + 1e-5], 7)
    y = 3 + 0.1 * np.log(n / 3e8) ** 2 + np.tile([-0.02, 0.02], 7)
    columns = {"n": np.tile(n, 2), "c": np.repeat([1e19, 1e20], 14), "loss": np.tile(y, 2)}
    for minimum in isoflop.fit(columns, "akima").minima:
        assert minimum.n == pytest.approx(3e8, rel=0.1)
        assert minimum.loss == pytest.approx(3, abs=0.02)


def test_minima_at_the_edge_are_refused():
    c = np.repeat([1e18, 1e19, 1e20], 6)
    n = np.tile(np.geomspace(1e5, 1e6, 6), 3)  # all too small
    columns = {"n": n, "c": c, "d": c / (6 * n)}
    columns["loss"] = laws.CHINCHILLA.predict(TRUE, columns)
    with pytest.raises(UserError, match=r"0 of 3 budgets .* edge of the sizes"):
        isoflop.fit(columns, "akima")


def test_the_best_size_is_the_lowest_loss_of_its_budget():
    one = {name: np.array([value]) for name, value in TRUE.items()}
    best = optimum.best_size(one, 1e21)[0]
    n = np.geomspace(best / 1.5, best * 1.5, 10_001)
    loss = laws.CHINCHILLA.predict(TRUE, {"n": n, "d": 1e21 / (6 * n)})
    assert n[np.argmin(loss)] == pytest.approx(best, rel=1e-3)


def test_a_target_far_away_needs_force():
    columns = grid(0.01)
    far = 1e3 * columns["c"].max()
    with pytest.raises(UserError, match=r"1,000 times .* --force"):
        fit.fit(Points(columns), bootstraps=10, target=far)
    only = ["approach_3"]
    result = fit.fit(Points(columns), bootstraps=10, target=far, force=True, only=only, holdout=0)
    optimum = result["methods"]["approach_3"]["optimum"]
    assert optimum["c"] == far
    assert optimum["loss"]["interval"][0] <= optimum["loss"]["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": -1.0}, r"target=-1.0 must be a positive number of FLOPs"),
        ({"delta": 0.0}, r"delta=0.0 must be positive"),
        ({"bootstraps": -1}, r"bootstraps=-1 must be 0"),
        ({"target_unique": 1e9}, r"need those of the runs: --unique"),
        ({"chance": 0.25}, r"--accuracy"),
        ({"noise": "seeds"}, r"--seed_column"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=message):
        fit.fit(Points(grid()), **{"bootstraps": 2, "only": ["kaplan_d"], **options})


def write_csv(path, columns, header="params,tokens,nats"):
    rows = zip(columns["n"], columns["d"], columns["loss"], strict=True)
    lines = [",".join(map(repr, map(float, row))) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


NAMES = {"n": "params", "d": "tokens", "loss": "nats"}


def test_points_of_csv_and_jsonl_are_the_same(tmp_path):
    columns = grid()
    found = points.read(write_csv(tmp_path / "a.csv", columns), **NAMES)
    lines = [
        json.dumps({"params": n, "c": c, "nats": y, "done": True})
        for n, c, y in zip(columns["n"], columns["c"], columns["loss"], strict=True)
    ]
    lines.insert(3, json.dumps({"params": 1e9, "c": 1e18, "nats": 9.0, "done": False}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    other = points.read(
        str(tmp_path / "a.jsonl"), n="params", c="c", loss="nats", final="done", drop_highest=2
    )
    assert (other.unfinished, other.dropped, len(other)) == (1, 2, len(found) - 2)
    keep = np.sort(np.argsort(-columns["loss"], kind="stable")[2:])
    for name in ("n", "d", "c", "loss"):
        np.testing.assert_allclose(found.columns[name][keep], other.columns[name], rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("params,tokens,nats\n1,2,x\n", NAMES, r"a.csv, line 2: nats='x' is no number"),
        ("params,tokens,nats\n1,2,nan\n", NAMES, r"line 2: nats=nan must be positive and finite"),
        ("params,tokens,nats\n1,2,-3\n", NAMES, r"line 2: nats=-3 must be positive"),
        ("params,tokens\n1,2\n", NAMES, r"no column 'nats'; there are: params, tokens"),
        ("params,nats\n1,2\n", {"loss": "nats"}, r"no N, D or C: .* --n, --d and --c"),
        ("params,nats,s\n1,2,0\n", {"c": "params", "loss": "nats", "sparsity": "s"},
         r"--sparsity is of N, .* by --n"),
        ("params,nats,u\n1,2,9\n", {"n": "params", "loss": "nats", "unique": "u"},
         r"--unique is of D, .* by --d"),
        ("params,nats,r\n1,2,9\n", {"n": "params", "loss": "nats", "run": "r"},
         r"--run needs what grows along a run"),
        ("params,tokens,nats\n1,2,3\n1,2,3\n", NAMES, r"runs 1 and 2 have the same sizes"),
        ("params,tokens,nats\n", NAMES, r"no finished run"),
        (
            "params,tokens,nats,c\n1,2,3,12\n2,2,3,48\n", {**NAMES, "c": "c"},
            r"C is 1 to 2 times 6ND.*--flops",
        ),
    ],
)  # fmt: skip
def test_bad_points_are_one_line(tmp_path, text, names, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        points.read(str(tmp_path / "a.csv"), **names)


def test_too_few_points(tmp_path):
    few = {name: v[:4] for name, v in grid().items()}
    for method in ("approach_3", "variable_projection"):
        with pytest.raises(UserError, match=r"5 parameters, and there are 4 points; .* at least 6"):
            fit.fit(Points(few), only=[method])
    with pytest.raises(UserError, match=r"no method 'approach_4' .* approach_3,"):
        fit.fit(Points(few), only=["approach_4"])
    refused = fit.fit(Points(few), bootstraps=0)["refused"]  # of one size D alone can be fitted
    assert "needs 3 values of N, and there are 1" in refused["kaplan_n"]
    assert "approach_3" in refused
    assert "validation" not in refused


def test_the_verb_writes_every_number(tmp_path, capsys):
    from t5x_lite import cli

    path = write_csv(tmp_path / "a.csv", grid(0.01))
    argv = ["fit", path, "--n", "params", "--d", "tokens", "--loss", "nats", "--holdout", "0"]
    argv += ["--only", "approach_3", "approach_2_parabola", "--bootstraps", "20"]
    assert cli.main([*argv, "--out", str(tmp_path / "out"), "--target", "1e21"]) == 0
    assert "approach_3" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/fit.json").read_text())
    assert result["methods"]["approach_3"]["parameters"]["E"]["value"] == pytest.approx(
        1.69, abs=0.1
    )
    assert "approach_2_parabola" in result["refused"]
    assert cli.main([*argv[:-1], "x", "--out", str(tmp_path / "out")]) == 2
