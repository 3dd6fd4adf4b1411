"""The report holds every number of the fit, needs no network, and draws what there is."""

import csv
import html.parser
import json
import re
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.scaling import (
    constrained,
    drawing,
    figures,
    fit,
    labels,
    laws,
    optimum,
    report,
)
from t5x_lite.scaling.pictures import budgets
from t5x_lite.scaling.points import Points

TRUE = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
METHODS = (
    *("approach_3", "approach_2_parabola", "approach_2_akima", "approach_1", "kaplan_c_floor"),
    "downstream",
)
OF_OTHER_LAWS = {"residuals", "sparse", "repeated"}


@pytest.fixture(scope="module")
def fitted():
    """IsoFLOP budgets with an accuracy, and their fit."""
    one = {name: np.array([value]) for name, value in TRUE.items()}
    c = np.repeat([1e18, 1e19, 1e20, 1e21], 7)
    best = np.array([optimum.best_size(one, each)[0] for each in c])
    n = best * np.tile(np.geomspace(0.3, 4, 7), 4)
    columns = {"n": n, "c": c, "d": c / (6 * n)}
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(n)))
    columns["loss"] = laws.CHINCHILLA.predict(TRUE, columns) * noise
    columns["accuracy"] = 0.25 + 0.6 / (1 + np.exp(4 * (columns["loss"] - 2.6)))
    points = Points(columns, unfinished=3)
    return points, fit.fit(points, bootstraps=12, target=1e23, only=METHODS, holdout=1)


@pytest.fixture(scope="module")
def pictures(fitted):
    """All of them, drawn once."""
    points, result = fitted
    with matplotlib.rc_context(drawing.LOOK):
        return list(figures.draw(result, points))


@pytest.fixture(scope="module")
def folder(fitted, pictures, tmp_path_factory):
    """The report's folder, with fit.json."""
    points, result = fitted
    out = tmp_path_factory.mktemp("fits") / "a <b>&"
    fit.write(result, str(out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: iter(pictures))
        assert report.write(result, points, str(out)) == out / "report.html"
    return out


@pytest.fixture
def no_matplotlib(monkeypatch):
    """The report without pictures, as where matplotlib isn't installed."""
    monkeypatch.setattr(report.util, "find_spec", lambda name: None)


class Page(html.parser.HTMLParser):
    """Attributes, text and balance of a page."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.attributes, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


def test_the_page_needs_no_network(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    links = [value for _, name, value in page.attributes if name.split(":")[-1] in ("src", "href")]
    there = {path.name for path in folder.iterdir()}
    assert {link for link in links if not link.startswith(("#", "data:"))} <= there
    assert not re.search(r"@import|<script|<link|url\((?!#)", text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {link[1:] for link in links if link.startswith("#")}
    assert referred | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert "a <b>&" in page.text  # a name, not a tag


def test_the_pictures_take_the_colour_of_the_page(folder):
    text = (folder / "report.html").read_text()
    inside = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert inside.count("currentColor") > 100
    assert drawing.INK not in inside


def every_number(part):
    """All numbers of JSON."""
    if isinstance(part, dict | list):
        for each in part.values() if isinstance(part, dict) else part:
            yield from every_number(each)
    elif isinstance(part, int | float):
        yield part


def test_every_number_is_in_the_tables_and_on_the_page(fitted, folder):
    result = json.loads((folder / "fit.json").read_text())
    with open(folder / "numbers.csv") as file:
        rows = list(csv.DictReader(file))
    stored = {float(row[k]) for row in rows for k in ("value", "low", "high") if row[k]}
    assert set(every_number(result)) == stored
    found = {(row["method"], row["quantity"]): row for row in rows}
    alpha = result["methods"]["approach_3"]["parameters"]["alpha"]
    row = found["approach_3", "parameters.alpha"]
    assert [float(row[k]) for k in ("value", "low", "high")] == [alpha["value"], *alpha["interval"]]
    text = Page((folder / "report.html").read_text()).text
    for method in result["methods"].values():
        for number in method.get("parameters", {}).values():
            assert labels.number(number["value"]) in text
            assert labels.interval(number["interval"], 3) in text


def test_the_runs_are_in_a_table_with_their_predictions(fitted, folder):
    points, result = fitted
    with open(folder / "points.csv") as file:
        rows = list(csv.DictReader(file))
    for name, values in points.columns.items():
        np.testing.assert_array_equal([float(row[name]) for row in rows], values)
    parameters = result["methods"]["approach_3"]["parameters"]
    law = laws.CHINCHILLA.predict({k: v["value"] for k, v in parameters.items()}, points.columns)
    np.testing.assert_allclose([float(row["by_approach_3"]) for row in rows], law, rtol=1e-12)


def test_every_picture_is_drawn(folder):
    assert {path.stem for path in folder.glob("*.png")} == set(figures.PICTURES) - OF_OTHER_LAWS
    for path in folder.glob("*.png"):
        pixels = matplotlib.image.imread(path)[:, :, :3]
        assert len(np.unique(pixels[::3, ::3] @ [1, 1e-3, 1e-6])) > 30, path.name
        # Nothing is cut off: the outermost pixels are paper.
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all(np.all(edge == 1) for edge in edges), path.name
    assert not list(folder.glob("*.tmp"))


def test_training_curves_are_drawn_where_there_are_any():
    n, d = np.array([1e7, 1e7, 1e8, 1e8]), np.array([1e8, 1e9, 1e8, 1e9])
    curves = {"n": n, "d": d, "c": 6 * n * d, "loss": 20 * d**-0.1, "run": np.array([0, 0, 1, 1])}
    points = Points({name: curves[name][1::2] for name in ("n", "d", "c", "loss")}, curves=curves)
    (picture,) = figures.draw({"largest_c": 6e17, "methods": {}}, points)
    drawn = {tuple(line.get_xdata()) for line in picture.figure.axes[0].lines}
    assert {tuple(curves["c"][:2]), tuple(curves["c"][2:])} <= drawn
    assert "training curve" in picture.caption


def test_both_intervals_are_in_a_cell():
    number = {"value": 0.5, "interval": [0.4, 0.6], "noise_interval": [0.45, 0.55]}
    text = report._cell(number)
    assert text == "0.5000<small>0.400 … 0.600</small><small>0.450 … 0.550</small>"
    assert report._cell(None) == "–"


def test_sparse_models_have_residuals_in_place_of_a_surface():
    n, d, density = np.geomspace(1e7, 1e9, 6), np.geomspace(2e5, 1e6, 6), np.array([1, 0.5] * 3)
    points = Points({"n": n, "d": d, "c": 6 * n * d, "density": density, "loss": 20 * n**-0.1})
    sparse = {"law": "L", "parameters": {}, "predicted": list(20.1 * n**-0.1)}
    result = {"largest_c": 6e15, "methods": {"sparse": sparse}}
    with matplotlib.rc_context(drawing.LOOK):
        pictures = list(figures.draw(result, points))
    assert [picture.name for picture in pictures] == ["compute", "residuals", "predicted"]
    test_labels_do_not_overlap(pictures)


def lines_of(axes):
    """Full lines of an axes, as functions of x."""
    return [
        lambda x, line=line: np.interp(np.log(x), np.log(line.get_xdata()), line.get_ydata())
        for line in axes.lines
        if line.get_linestyle() == "-"
    ]


def drawn(name, law, true, columns):
    """The picture of a method that has found the true law."""
    loss = law.predict(true, columns)
    points = Points({**columns, "c": 6 * columns["n"] * columns["d"], "loss": loss})
    parameters = {key: {"value": value} for key, value in true.items()}
    method = {"law": law.name, "parameters": parameters, "predicted": loss.tolist()}
    result = {"largest_c": float(points.columns["c"].max()), "methods": {name: method}}
    with matplotlib.rc_context(drawing.LOOK):
        pictures = {picture.name: picture for picture in figures.draw(result, points)}
    test_labels_do_not_overlap(pictures.values())
    return pictures, loss


@pytest.mark.parametrize("counts_zeros", [True, False])
def test_loss_against_sparsity_has_a_line_through_the_runs_of_each_size(counts_zeros):
    size, d, density = (a.ravel() for a in np.meshgrid([1e7, 1e8], [1e9, 4e9], [1, 0.5, 0.1]))
    n = size * density if counts_zeros else size
    columns = {"n": n, "d": d, "density": density}
    true = {"a_S": 20.0, "c_S": 60.0, "a_D": 300.0, "c": 1.5, "b_S": 0.6, "b_N": 0.25, "b_D": 0.3}
    pictures, loss = drawn("sparse", laws.SPARSE, true, columns)
    picture = pictures["sparse"]
    for axes, tokens in zip(picture.figure.axes, (1e9, 4e9), strict=False):
        lines = lines_of(axes)
        assert len(lines) == 2
        for line, each in zip(lines, (1e7, 1e8), strict=True):
            rows = (d == tokens) & (size == each)
            np.testing.assert_allclose(line(density[rows]), loss[rows], rtol=1e-4)
        assert axes.xaxis_inverted()
        dots = axes.collections[0].get_offsets()
        np.testing.assert_allclose(sorted(dots[:, 1]), sorted(loss[d == tokens]))
    assert ("weights in all" in picture.caption) == counts_zeros


def test_loss_against_repetitions_leaves_that_of_fresh_tokens():
    n, unique, reads = (a.ravel() for a in np.meshgrid([1e8, 1e9], [1e8, 1e9], [1, 4, 40]))
    columns = {"n": n, "unique": unique, "d": unique * reads}
    true = {"A": 400.0, "B": 400.0, "E": 1.7, "alpha": 0.3, "beta": 0.3, "R_D": 15.0, "R_N": 5.0}
    pictures, loss = drawn("data_constrained", constrained.CONSTRAINED, true, columns)
    for axes, tokens in zip(pictures["repeated"].figure.axes, (1e8, 1e9), strict=False):
        lines = lines_of(axes)
        fresh = [line for line in axes.lines if line.get_linestyle() != "-"]
        assert len(lines) == len(fresh) == 2
        for line, dashed, each in zip(lines, fresh, (1e8, 1e9), strict=True):
            rows = (unique == tokens) & (n == each)
            np.testing.assert_allclose(line(reads[rows]), loss[rows], rtol=1e-3)
            new = dashed.get_ydata()
            assert new[0] == pytest.approx(loss[rows][0])  # read once, tokens are new
            assert new[-1] < line(reads.max()) - 0.02
    none = {**columns, "unique": unique * np.linspace(1, 2, 12), "d": columns["d"] * 3}
    assert "repeated" not in drawn("data_constrained", constrained.CONSTRAINED, true, none)[0]


def test_numbers_that_json_does_not_know_break_nothing(fitted, tmp_path):
    points, result = fitted
    names = ("approach_3", "approach_2_parabola")
    count = iter(range(10**9))

    def with_holes(part):
        if isinstance(part, dict):
            known = ("budgets", "c")
            return {k: v if k in known else with_holes(v) for k, v in part.items()}
        if isinstance(part, list):
            return [with_holes(each) for each in part]
        return None if isinstance(part, float) and next(count) % 7 == 3 else part

    holed = {**result, "methods": with_holes({name: result["methods"][name] for name in names})}
    holed |= {"validation": with_holes(result["validation"]), "downstream": None}
    holed["comparison"] = with_holes(result["comparison"])
    drawn = [picture(figures._with_nan(holed), points) for picture in figures.PICTURES.values()]
    assert sum(picture is not None for picture in drawn) == 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: iter(()))
        assert "None" not in report.write(holed, points, str(tmp_path)).read_text()


def test_labels_do_not_overlap(pictures):
    for picture in pictures:
        figure = picture.figure
        for axes in figure.axes:
            for axis, end in ((axes.xaxis, "x"), (axes.yaxis, "y")):
                boxes = [
                    label.get_window_extent()
                    for label in axis.get_ticklabels()
                    if label.get_visible() and label.get_text()
                ]
                boxes.sort(key=lambda box, end=end: getattr(box, f"{end}0"))
                for one, other in pairwise(boxes):
                    assert getattr(one, f"{end}1") < getattr(other, f"{end}0"), picture.name
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_a_drawn_parabola_is_that_of_least_squares(fitted):
    points, result = fitted
    columns = points.columns
    minimum = result["methods"]["approach_2_parabola"]["budgets"][1]
    rows = columns["c"] == 1e19
    n, loss = columns["n"][rows], columns["loss"][rows]
    x, y = budgets.curve("approach_2_parabola", minimum, n, loss)
    expected = np.polyval(np.polyfit(np.log(n), loss, 2), np.log(x))
    np.testing.assert_allclose(y, expected, rtol=1e-9)


@pytest.mark.usefixtures("no_matplotlib")
def test_the_page_says_what_to_distrust(fitted, tmp_path):
    points, result = fitted
    changed = dict(result, refused={"approach_9": "too few <runs>"})
    changed["methods"] = dict(result["methods"])
    changed["methods"]["approach_3"] = dict(
        result["methods"]["approach_3"], not_identified={"beta": "one number of tokens"}
    )
    text = Page(report.write(changed, points, str(tmp_path)).read_text()).text
    assert "approach 3: β is not identified: one number of tokens" in text
    assert "10²³ FLOPs are 100 times the largest fitted run" in text
    assert "too few <runs>" in text
    assert "3 unfinished" in text


def test_what_is_unknown_or_missing_breaks_nothing(tmp_path, request):
    points = Points({"n": np.array([1e6, 2e6]), "d": np.array([1e8, 2e8]),
                     "c": np.array([6e14, 24e14]), "loss": np.array([4.0, 3.5])})  # fmt: skip
    result = {
        "points": 2, "unfinished": 0, "dropped": 0, "largest_c": 24e14, "refused": {},
        "methods": {"of_the_future": {"law": "L = Q", "surprise": {"value": 42.5}}},
        "more": [{"deep": 1234.75}], "comparison": None,
    }  # fmt: skip
    page = report.write(result, points, str(tmp_path))
    assert "of the future" in page.read_text()
    rows = (tmp_path / "numbers.csv").read_text().splitlines()
    assert "of_the_future,surprise,42.5,," in rows
    assert ",more[0].deep,1234.75,," in rows
    assert [path.stem for path in tmp_path.glob("*.png")] == ["compute"]
    request.getfixturevalue("no_matplotlib")
    text = report.write(result, points, str(tmp_path)).read_text()
    assert "pip install 't5x_lite[scaling]'" in Page(text).text
    assert not list(tmp_path.glob("*.png"))  # those of the report before


@pytest.mark.usefixtures("no_matplotlib")
def test_a_failed_write_leaves_the_last_report(fitted, folder, monkeypatch):
    points, result = fitted
    before = (folder / "report.html").read_bytes()

    replace = Path.replace

    def fails(self, target):
        if target.name == "report.html":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as full:
        full.setattr(Path, "replace", fails)
        with pytest.raises(UserError, match=r"report\.html cannot be written: No space left"):
            report.write({**result, "points": 0}, points, str(folder))
    assert (folder / "report.html").read_bytes() == before
    (folder.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: \w+") as error:
        report.write(result, points, str(folder.parent / "file"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.34731, "0.3473"), (2143.417, "2143"), (12345.6, "12,346"), (1.2956e22, "1.296×10²²"),
        (6.1e-9, "6.100×10⁻⁹"), (0.0, "0"), (-0.00149, "−0.001490"), (9.9999, "10.00"),
        (99999.9, "100,000"), (9999.97, "10,000"), (1e6, "1.000×10⁶"), (None, "–"),
        (5678.9, "5679"), (float("nan"), "–"), (float("inf"), "∞"), (7, "7"), (70000, "70,000"),
    ],
)  # fmt: skip
def test_numbers_for_readers(value, text):
    assert labels.number(value) == text


def test_short_numbers_and_intervals():
    assert [labels.short(v) for v in (1e21, 2e21, 1.5e-7, 20.0, 0.25, 3e5)] == [
        "10²¹", "2×10²¹", "1.5×10⁻⁷", "20", "0.25", "3×10⁵",
    ]  # fmt: skip
    assert labels.beside({"value": 7.9e7, "interval": [7.16e7, 1.1e8]}) == "7.90×10⁷ (7.16 … 11.0)"
    assert labels.interval([0.5, 0.5]) == "fixed"
    assert labels.prose("approach_3_tied at 1e+21") == "approach 3 (α = β) at 10²¹"
