"""Kaplan's exponents come back from losses that follow his laws."""

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.scaling import curved, fit, kaplan, laws, optimum
from t5x_lite.scaling.points import Points

# Kaplan et al. 2020, eq. 1.1-1.3 and table 2; C in FLOPs, a PF-day is 8.64e19.
ONE = {"n": (0.076, 8.8e13), "d": (0.095, 5.4e13), "c": (0.050, 3.1e8 * 8.64e19)}
BOTH = {"alpha_N": 0.076, "alpha_D": 0.103, "N_c": 6.4e13, "D_c": 1.8e13}


def grid():
    n = np.repeat(np.geomspace(1e6, 1e9, 5), 5)
    d = np.tile(np.geomspace(1e8, 1e11, 5), 5)
    return {"n": n, "d": d, "c": 6 * n * d}


@pytest.mark.parametrize("column", ["n", "d", "c"])
def test_published_exponents_of_one_variable(column):
    alpha, critical = ONE[column]
    columns = grid()
    columns["loss"] = (critical / columns[column]) ** alpha
    plain, _ = kaplan.fit_one(columns, column, floor=False)
    found = kaplan.with_critical(plain, column).parameters
    assert found == pytest.approx({"alpha": alpha, f"{column.upper()}_c": critical}, rel=1e-6)
    columns["loss"] += 0.5
    floor, _ = kaplan.fit_one(columns, column, floor=True)
    assert floor.parameters["E"] == pytest.approx(0.5, rel=1e-5)
    assert floor.parameters["alpha"] == pytest.approx(alpha, rel=1e-5)


def test_a_power_of_one_variable_is_of_the_runs_that_others_hold_back_least():
    columns = grid()
    columns["loss"] = laws.CHINCHILLA.predict(
        {"A": 300.0, "B": 400.0, "E": 1.7, "alpha": 0.3, "beta": 0.3}, columns
    )
    assert kaplan.lowest(columns, "n").tolist() == [4, 9, 14, 19, 24]  # the most tokens of each
    assert kaplan.lowest(columns, "d").tolist() == [20, 21, 22, 23, 24]
    rows = kaplan.lowest(columns, "c")
    for row in rows:
        less = columns["c"] < columns["c"][row] * (1 - 1e-9)
        assert np.all(columns["loss"][less] > columns["loss"][row])
    assert "gain" in kaplan.held_back(columns, "d")
    columns["loss"] = columns["n"] ** -0.076
    assert kaplan.held_back(columns, "n") == ""


def test_both_with_noise_and_the_best_size():
    columns = grid()
    exact = kaplan.BOTH.predict(BOTH, columns)
    assert exact[7] == pytest.approx(
        ((6.4e13 / columns["n"][7]) ** (0.076 / 0.103) + 1.8e13 / columns["d"][7]) ** 0.103
    )
    columns["loss"] = exact
    assert curved.fit(kaplan.BOTH, columns, starts=15).parameters == pytest.approx(BOTH, rel=1e-6)
    noise = 0.002 * np.random.default_rng(0).standard_normal(25)
    columns["loss"] = exact * np.exp(noise)
    found = fit.fit(Points(columns), bootstraps=40, only=["kaplan_nd"], target=1e20)
    method = found["methods"]["kaplan_nd"]
    for name, true in BOTH.items():
        low, high = method["parameters"][name]["interval"]
        assert low < true < high, name
    p = {name: each["value"] for name, each in method["parameters"].items()}
    n = np.geomspace(1e6, 1e12, 20_001)
    loss = kaplan.BOTH.predict(p, {"n": n, "d": 1e20 / (6 * n)})
    best = method["optimum"]
    assert best["n"]["value"] == pytest.approx(n[np.argmin(loss)], rel=1e-3)
    assert best["loss"]["value"] == pytest.approx(loss.min(), rel=1e-7)
    assert method["predicted"] == pytest.approx(kaplan.BOTH.predict(p, columns))


def test_a_few_values_are_refused_with_their_number():
    columns = {name: values[:10] for name, values in grid().items()}
    columns["loss"] = columns["d"] ** -0.1
    with pytest.raises(UserError, match=r"needs 3 values of N, and there are 2"):
        kaplan.fit_one(columns, "n", floor=False)


def test_the_optimum_follows_how_the_runs_count_flops():
    columns = grid()
    columns["c"] = 8 * columns["n"] * columns["d"]  # forward passes computed anew
    true = {"A": 300.0, "B": 400.0, "E": 1.7, "alpha": 0.3, "beta": 0.4}
    columns["loss"] = laws.CHINCHILLA.predict(true, columns)
    result = fit.fit(Points(columns), bootstraps=0, only=["approach_3"], target=1e21)
    best = result["methods"]["approach_3"]["optimum"]
    assert best["n"]["value"] * best["d"]["value"] == pytest.approx(1e21 / 8)
    one = {name: np.array([value]) for name, value in true.items()}
    assert best["n"]["value"] == pytest.approx(optimum.best_size(one, 1e21 * 6 / 8)[0], rel=1e-6)


@pytest.mark.parametrize("column", ["n", "d", "c"])
def test_one_column_alone_gives_its_own_laws_and_the_others_say_what_they_lack(column):
    alpha, critical = ONE[column]
    whole = grid()
    whole["loss"] = (critical / whole[column]) ** alpha
    alone = Points({name: whole[name] for name in (column, "loss")})
    result = fit.fit(alone, bootstraps=8)
    assert result["methods"].keys() == {f"kaplan_{column}", f"kaplan_{column}_floor"}
    found = result["methods"][f"kaplan_{column}"]["parameters"]
    assert found["alpha"]["value"] == pytest.approx(alpha, rel=1e-6)
    assert found[f"{column.upper()}_c"]["value"] == pytest.approx(critical, rel=1e-5)
    every = fit.fit(Points(whole), bootstraps=0)
    there = every["methods"].keys() | every["refused"].keys() - {"validation"}
    assert result["methods"].keys() | result["refused"].keys() == there
    lacks = {name: set(why.split(" is known")[0].replace("no ", "").split(" and "))
             for name, why in result["refused"].items()}  # fmt: skip
    assert lacks["approach_3"] == lacks["approach_2_akima"] == {"N", "D"} - {column.upper()}
    assert all(lacks[f"kaplan_{other}"] == {other.upper()} for other in {*"ndc"} - {column})
    assert all(f"--{column}" not in why for why in result["refused"].values())
    assert ("caveat" in result["methods"][f"kaplan_{column}"]) == (column != "c")


def test_compute_alone_predicts_the_loss_of_a_target():
    c = np.geomspace(1e18, 1e21, 9)
    columns = {"c": c, "loss": 1.8 + 1e3 * c**-0.16}
    noise = np.exp(0.001 * np.random.default_rng(0).standard_normal(9))
    columns["loss"] = columns["loss"] * noise
    result = fit.fit(Points(columns), bootstraps=60, target=1e22)
    best = result["methods"]["kaplan_c_floor"]["optimum"]
    assert best.keys() == {"c", "loss"}
    low, high = best["loss"]["interval"]
    assert low < 1.8 + 1e3 * 1e22**-0.16 < high
    assert high - low < 0.1
    assert result["comparison"]["methods"].keys() == {"kaplan_c", "kaplan_c_floor"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1e20}, r"in FLOPs, and of the runs N alone is known: .* --d or --c"),
        ({"holdout": 1}, r"no law of N alone is tried"),
        ({"only": ["approach_3"]}, r"no D is known: name one more column by --d or --c"),
    ],
)
def test_what_one_column_cannot_say(options, message):
    n = np.geomspace(1e7, 1e9, 6)
    with pytest.raises(UserError, match=message):
        fit.fit(Points({"n": n, "loss": 20 * n**-0.1}), bootstraps=0, **options)
    with pytest.raises(UserError, match="need N, D or C"):
        fit.fit(Points({"loss": n}), bootstraps=0)


def test_a_table_of_sizes_and_losses_is_fitted_by_the_verb(tmp_path, capsys):
    from t5x_lite import cli

    rows = [f"{n:g},{20 * n**-0.1}" for n in np.geomspace(1e7, 1e9, 6)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["size,loss,wins", *(f"{row},{0.3 + i / 20}"
                    for i, row in enumerate([rows[0], *rows]))]))  # fmt: skip
    out = tmp_path / "out"
    argv = ["fit", str(path), "--n", "size", "--accuracy", "wins", "--bootstraps", "5"]
    assert cli.main([*argv, "--out", str(out)]) == 0  # two runs of a size may have equal losses
    said = " ".join(capsys.readouterr().out.split())
    assert "approach_3, approach_3_tied" in said
    assert said.count("no D is known") == 1
    assert {path.stem for path in out.glob("*.png")} == {"kaplan", "downstream"}
    assert (out / "report.html").read_text().count("no D is known") == 1
