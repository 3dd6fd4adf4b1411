"""Any table is read by naming its columns, and what cannot be meant is one line."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from t5x_lite import cli
from t5x_lite.errors import UserError
from t5x_lite.scaling import expressions, fit, laws, points, show
from t5x_lite.scaling.expressions import Expression
from t5x_lite.scaling.points import Points

ROW = {
    "Model Size": "1.5B",
    "tokens": "3e9",
    "acc %": "40",
    "set": "c4",
    "ppl": "20.0",
    "done": "1",
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Model Size", "1.5B"),
        ("`Model Size` / 1e9", 1.5),
        ("log(ppl)", math.log(20)),
        ("-tokens ** 2 + 6 * (tokens - 1e9)", -9e18 + 12e9),
        ("1 - `acc %` / 100", 0.6),
        ("sqrt(tokens * 3) + log10(tokens / 3)", math.sqrt(9e9) + 9),
        ("set == 'c4' and 2 < tokens <= 3e9 and not ppl > 20", True),
        ("set == 'rpj' or tokens != 3e9", False),
        ("set > 3", False),  # text is no number
    ],
)
def test_arithmetic_on_columns(text, value):
    found = Expression(text, list(ROW), "--d")(ROW)
    assert found == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ("cell", "value"),
    [("12,345.5", 12345.5), (" 40% ", 0.4), ("7B", 7e9), ("190M", 190e6), ("1.5t", 1.5e12),
     ("2e3", 2000.0), (5, 5.0), ("1,23", None), ("B", None), ("", None)],
)  # fmt: skip
def test_numbers_with_units(cell, value):
    if value is None:
        with pytest.raises(ValueError, match="float"):
            expressions.number(cell)
    else:
        assert expressions.number(cell) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokns", r"--d: no column 'tokns'; there are: Model Size, tokens"),
        ("`Model size` * 2", r"no column 'Model size'"),
        ("Model Size * 2", r"no column 'Model Size \* 2'"),
        ("__import__('os')", r"no column '__import__'"),
        ("tokens.real", r"has Attribute, and only \+ - \* /"),
        ("tokens[0]", r"has Subscript"),
        ("log(tokens, 2)", r"has Call"),
        ("tokens // 2", r"has BinOp"),
        ("[tokens]", r"has List"),
        ("(lambda: 1)()", r"has Call"),
    ],
)
def test_only_arithmetic_is_read(text, message):
    with pytest.raises(UserError, match=message):
        Expression(text, list(ROW), "--d")


def write(path, text):
    path.write_text(text)
    return str(path)


CSV = """ size , billions,ppl,set, S,wins
1M,0.1,30,c4,0,25%
2M,0.2,25,c4,0.5,
4M,0.4,20,c4,0.75,50%
8M,0.8,9,other,0.75,90%
"""


def test_a_table_of_another_shape(tmp_path):
    found = points.read(
        write(tmp_path / "a.csv", CSV), n="size", d="billions * 1e9", loss="log(ppl)",
        where="set == 'c4'", accuracy="wins", unique="3e8", sparsity="S",
    )  # fmt: skip
    columns = found.columns
    np.testing.assert_allclose(columns["n"], [1e6, 1e6, 1e6])  # those that aren't zero
    np.testing.assert_allclose(columns["d"], [1e8, 2e8, 4e8])
    np.testing.assert_allclose(columns["loss"], np.log([30, 25, 20]))
    np.testing.assert_allclose(columns["unique"], [1e8, 2e8, 3e8])  # a short run sees a part
    np.testing.assert_allclose(columns["density"], [1, 0.5, 0.25])
    np.testing.assert_allclose(columns["accuracy"], [0.25, np.nan, 0.5])
    np.testing.assert_allclose(columns["c"], [6e14, 2.4e15, 9.6e15])


def test_a_list_of_json_objects(tmp_path):
    text = '[{"n": 1e6, "d": 2e7, "loss": 3.5}, {"n": 2e6, "d": 2e7, "loss": 3.3}]'
    assert len(points.read(write(tmp_path / "a.json", text), n="n", d="d")) == 2
    with pytest.raises(UserError, match=r"not a list of JSON objects"):
        points.read(write(tmp_path / "a.json", "{}"), n="n", d="d")


NAMES = {"n": "n", "d": "d", "loss": "loss"}


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("n,d,loss\n1,2,3\n", {**NAMES, "where": "n > 5"}, r"true in none of its 1 rows"),
        ("n,d,loss\n1,2,0\n", {**NAMES, "d": "d / loss"}, r"line 2: .*division.*--where"),
        ("n,d,loss\n1,2,x\n", {**NAMES, "loss": "log(loss)"}, r"line 2: 'x' is no number"),
        ("n,d,loss,a\n1,2,3,40\n", {**NAMES, "accuracy": "a"}, r"--accuracy 'a / 100'"),
        ("n,d,loss,u\n1,2,3,-4\n", {**NAMES, "unique": "u"}, r"u=-4 must be positive"),
        ("n,d,loss,s\n1,2,3,1\n", {**NAMES, "sparsity": "s"}, r"share of zeros, in \[0, 1\)"),
        ("n,d,loss,k\n1,2,3,1\n1,2,4,1\n", {**NAMES, "seed_column": "k"},
         r"runs 1 and 2 have the same sizes and the same seed"),
        ("n,d,loss,f\n1,2,3,no\n1,2,,0\n", {**NAMES, "final": "f"}, r"no finished run \(2 unf"),
        ("n,d,loss\n1,2,inf\n", NAMES, r"loss=inf must be positive and finite"),
        ("n,d,loss\n1,2\n", NAMES, r"line 2: loss=None is no number"),
    ],
)  # fmt: skip
def test_more_bad_points_are_one_line(tmp_path, text, names, message):
    with pytest.raises(UserError, match=message) as error:
        points.read(write(tmp_path / "a.csv", text), **names)
    assert "\n" not in str(error.value)


def test_seeds_may_have_equal_losses_and_unfinished_rows_none(tmp_path):
    text = "n,d,loss,k,f\n1,2,3,1,true\n1,2,3,2,true\n1,3,,1,false\n"
    found = points.read(write(tmp_path / "a.csv", text), **NAMES, seed_column="k", final="f")
    assert (len(found), found.unfinished) == (2, 1)
    assert found.columns["seed"].tolist() == [0, 1]


def test_experts_are_sparse_by_active_over_total(tmp_path):
    """A mixture of experts: N counts all weights, the share that no token uses is the sparsity."""
    active, experts, d = (
        a.ravel() for a in np.meshgrid([1e7, 4e7, 2e8], [1, 4, 16, 64], [1e9, 6e9, 3e10])
    )
    true = {"a_S": 20.0, "c_S": 60.0, "a_D": 300.0, "c": 1.5, "b_S": 0.6, "b_N": 0.25, "b_D": 0.3}
    columns = {"n": active, "d": d, "density": 1 / experts}
    loss = laws.SPARSE.predict(true, columns)
    rows = zip(active * experts, active, d, loss, strict=True)
    text = "\n".join(["total,active,d,loss", *(",".join(map(repr, map(float, r))) for r in rows)])
    found = points.read(
        write(tmp_path / "moe.csv", text), n="total", d="d", sparsity="1 - active / total"
    )
    np.testing.assert_allclose(found.columns["n"], active)
    fitted = laws.fit(laws.SPARSE, found.columns, starts=15)
    assert fitted.parameters == pytest.approx(true, rel=1e-3)


def test_a_wide_interval_says_that_a_parameter_is_not_identified():
    n = np.repeat(np.geomspace(1e8, 1.05e8, 4), 4)  # hardly any range
    d = np.tile(np.geomspace(1e9, 1e11, 4), 4)
    columns = {"n": n, "d": d, "c": 6 * n * d}
    true = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
    noise = np.exp(0.005 * np.random.default_rng(0).standard_normal(16))
    columns["loss"] = laws.CHINCHILLA.predict(true, columns) * noise
    for method in ("approach_3", "variable_projection"):
        result = fit.fit(Points(columns), bootstraps=40, only=[method], holdout=0)
        weak = result["methods"][method]["not_identified"]
        assert {"alpha", "E"} & weak.keys()
        assert "beta" not in weak
    assert "its 95% interval spans" in weak["alpha"]


def test_variable_projection_names_flat_directions():
    n, d = np.repeat([1e8, 1e9], 6), np.tile(np.geomspace(1e9, 1e11, 6), 2)
    columns = {"n": n, "d": d, "c": 6 * n * d}
    true = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
    columns["loss"] = laws.CHINCHILLA.predict(true, columns)  # two sizes: A, α and E are one
    result = fit.fit(Points(columns), bootstraps=0, only=["variable_projection"], holdout=0)
    weak = result["methods"]["variable_projection"]["not_identified"]
    assert {"A", "alpha", "E"} & weak.keys()
    assert "beta" not in weak


def test_mapped_columns_are_fitted_and_shown(tmp_path, capsys):
    path = write(tmp_path / "a.csv", "n,d,loss\n" + "\n".join(
        f"{n},{d},{1.7 + 300 * (n * 1e6) ** -0.3 + 400 * (d * 1e9) ** -0.3}"
        for n in (10, 30, 90, 270) for d in (1, 4, 16)
    ))  # fmt: skip
    found = points.read(path, n="n * 1e6", d="d * 1e9")
    names = ["approach_3", "kaplan_nd"]
    result = fit.fit(found, bootstraps=8, holdout=1, only=names, target=1e20)
    out = io.StringIO()
    show.show(result, Console(width=160, file=out))
    for words in ("12 points", "10²⁰", "largest / smallest", "runs predicted", "alpha"):
        assert words in out.getvalue()
    argv = ["fit", path, "--n", "n * 1e6", "--d", "d * x", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "no column 'x'" in capsys.readouterr().err
