"""A fit as a page to read and to print, as pictures and as tables: report.html, *.png, *.csv.

The page is one file and needs no network; its pictures take the reader's colours, dark or light.

Reads of `fit.fit`'s result "points", "unfinished", "dropped", "largest_c", "methods", "refused",
"noise", "comparison", "validation" and "downstream"; of a method "law", "objective", "parameters",
"n_exponent", "d_exponent", "not_identified", "caveat", "predicted", "budgets", "frontier" and
"optimum". What is absent is left out; what else there is, is in the table of every number.
"""

import csv
import html
import io
import re
from collections.abc import Iterator, Sequence
from importlib import resources, util
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import drawing, figures, labels
from t5x_lite.scaling.pictures.parts import Picture
from t5x_lite.scaling.points import Points


def write(result: dict[str, Any], points: Points, out: str) -> Path:
    """Writes the report of a fit into the folder `out`; returns the page.

    Without matplotlib the page has no pictures, and says so.

    Args:
      result: of `fit.fit`.
      points: that were fitted.
      out: a folder, made where there is none; files of an earlier report are replaced.

    Raises:
      UserError: a folder that can't be written to.
    """
    folder = Path(out)
    rows = list(numbers(result))
    header = ("method", "quantity", "value", "low", "high")
    files = {"numbers.csv": _csv([header, *rows]), "points.csv": _csv(_point_rows(result, points))}
    shown = []
    for picture, png, svg in _pictures(result, points):
        files[f"{picture.name}.png"] = png
        shown.append((picture, svg))
    page = _page(f"Scaling laws: {folder.resolve().name}", result, points, shown, rows)
    path = folder / "report.html"
    files[path.name] = page.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            beside = folder / f"{name}.tmp"
            beside.write_bytes(content)
            beside.replace(folder / name)
        for name in figures.PICTURES:  # an earlier fit's may have been of other methods
            if f"{name}.png" not in files:
                (folder / f"{name}.png").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def numbers(result: dict[str, Any]) -> Iterator[tuple[str, str, Any, Any, Any]]:
    """Every number of a result: method or "", quantity, value, and its interval or two Nones."""
    for key, part in result.items():
        if key == "methods":
            for method, found in part.items():
                for row in _numbers_of(found, ""):
                    yield (method, *row)
        else:
            for row in _numbers_of(part, key):
                yield ("", *row)


def _numbers_of(part: Any, path: str) -> Iterator[tuple[str, Any, Any, Any]]:
    if isinstance(part, dict):
        rest = dict(part)
        if "value" in part:
            value = rest.pop("value")
            if isinstance(value, list):
                low, high = (rest.pop(end, [None] * len(value)) for end in ("low", "high"))
                for i, row in enumerate(zip(value, low, high, strict=True)):
                    yield (f"{path}[{i}]", *row)
            else:
                yield (path, value, *rest.pop("interval", (None, None)))
        for key, each in rest.items():
            yield from _numbers_of(each, f"{path}.{key}" if path else str(key))
    elif isinstance(part, list | tuple):
        for i, each in enumerate(part):
            yield from _numbers_of(each, f"{path}[{i}]")
    elif _is_number(part):
        yield (path, part, None, None)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- files ---------------------------------------------------------------------------------------


def _csv(rows) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _point_rows(result, points):
    """A header, then every point with the loss that each law predicts for it."""
    columns = dict(points.columns)
    methods = result["methods"]
    columns |= {f"by_{k}": np.array(m["predicted"]) for k, m in methods.items() if "predicted" in m}
    yield list(columns)
    yield from zip(*(column.tolist() for column in columns.values()), strict=True)


def _pictures(result, points):
    if util.find_spec("matplotlib") is None:
        return
    import matplotlib

    with matplotlib.rc_context(drawing.LOOK):
        for picture in figures.draw(result, points):
            yield picture, _png(picture.figure), _svg(picture)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def _svg(picture: Picture) -> str:
    """The picture as part of a page: no ids but its own, and the page's ink."""
    buffer = io.StringIO()
    picture.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].replace(drawing.INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{picture.name}-", text)
    size = re.compile(r' (width|height)="[^"]*pt"')
    label = html.escape(picture.title)
    return size.sub("", text, count=2).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


# --- the page ------------------------------------------------------------------------------------


def _page(title, result, points, shown, rows) -> str:
    sections = [
        _lead(result, points, shown),
        _in_short(result),
        _warnings(result),
        _optima(result),
        _parameters(result),
        _frontier(result),
        _downstream(result),
        _held_out(result),
        _remarks(result),
        _drawn(shown),
        _refused(result),
        _everything(result, points, rows),
    ]
    template = resources.files("t5x_lite.scaling").joinpath("report.html").read_text("utf-8")
    body = "\n".join(filter(None, sections))
    return Template(template).substitute(title=html.escape(title), body=body)


def _lead(result, points, shown):
    spans = [
        f"{labels.short(points.columns[name].min())} to {labels.short(points.columns[name].max())} "
        f"{unit}"
        for name, unit in (("c", "FLOPs"), ("n", "parameters"), ("d", "tokens"))
        if name in points.columns
    ]
    files = ["fit.json", "numbers.csv", "points.csv", *(f"{p.name}.png" for p, _ in shown)]
    links = "".join(f'<a href="{name}">{name}</a> ' for name in files)
    return (
        f"<p>{result['points']} runs of {', '.join(spans)}. Left out: {result['unfinished']} "
        f"unfinished, {result['dropped']} with the highest losses. Intervals are 95%.</p>"
        f"<nav>{links}</nav>"
    )


def _in_short(result):
    """The first method's optimum."""
    found = _headline(result)
    if found is None:
        return ""
    name, c, where, quantities = found
    cards = "".join(
        f"<div>{_maths(labels.quantity(key))}<b>{labels.number(number['value'], digits)}</b>"
        f"<small>{labels.interval(number.get('interval'), digits)}</small></div>"
        for key, number, digits in ((k, each, _digits(k)) for k, each in quantities.items())
    )
    return (
        f"<h2>Best use of {labels.short(c)} FLOPs, {where}</h2>"
        f'<p class="soft">By {labels.method(name)}.</p><div class="cards">{cards}</div>'
    )


def _headline(result):
    for name, method in result["methods"].items():
        if "optimum" in method:
            c = method["optimum"]["c"]
            rest = {key: each for key, each in method["optimum"].items() if key != "c"}
            where = "the compute of the largest run" if c == result["largest_c"] else "the target"
            return name, c, where, rest
    return None


def _along(frontier, at):
    """Quantities at one place of a frontier, as at the target."""
    found = {}
    for name, along in frontier.items():
        if name != "c":
            found[name] = {"value": along["value"][at]}
            if "low" in along:
                found[name]["interval"] = [along["low"][at], along["high"][at]]
    return found


def _warnings(result):
    comparison = result.get("comparison") or {}
    warnings = []
    target = comparison.get("c", 0.0)
    if target and target > result["largest_c"]:
        warnings.append(
            f"{labels.short(target)} FLOPs are {labels.short(target / result['largest_c'])} times "
            "the largest fitted run: what is said of them is an extrapolation, and its intervals "
            "only hold if the law does."
        )
    if remarks := comparison.get("remarks"):
        warnings.append(f"{len(remarks)} remarks on where methods part or err follow the tables.")
    for name, method in [
        *result["methods"].items(),
        ("downstream", result.get("downstream") or {}),
    ]:
        for parameter, why in method.get("not_identified", {}).items():
            what = f"{labels.method(name)}: {labels.quantity(parameter)}"
            warnings.append(f"{what} is not identified: {why}.")
    caveats: dict[str, list[str]] = {}
    for name, method in result["methods"].items():
        if "caveat" in method:
            caveats.setdefault(method["caveat"], []).append(labels.method(name))
    warnings += [f"{'; '.join(names)}: {caveat}." for caveat, names in caveats.items()]
    if not util.find_spec("matplotlib"):
        warnings.append("Pictures need matplotlib: pip install 't5x_lite[scaling]'.")
    if not warnings:
        return ""
    items = "".join(f"<li>{_maths(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings">{items}</ul>'


def _parameters(result):
    """Methods side by side: a table for each kind of law, a column for each of its parameters."""
    tables = []
    for methods in _kinds(result["methods"]):
        names = list(max(methods.values(), key=len))
        rows = []
        for name, known in methods.items():
            law = f"<small>{_maths(result['methods'][name].get('law', ''))}</small>"
            rows.append([f"{labels.method(name)}{law}", *(_cell(known.get(k)) for k in names)])
        tables.append(_table(["method", *(_maths(labels.quantity(name)) for name in names)], rows))
    noise = result.get("noise")
    second = "; the second one is of losses that err around a true law" if noise else ""
    return (
        f"<h2>Parameters</h2>{''.join(tables)}"
        f'<p class="soft">The 95% interval is below its number{second}. Objectives compare only '
        "between methods that minimise the same one.</p>"
    )


def _kinds(methods):
    """Methods whose parameters are among those of another one, together; C_c is X_c, as N_c is."""
    kinds: list[dict[str, dict[str, Any]]] = []
    for name, method in methods.items():
        known = dict(method.get("parameters", {}))
        critical = [key for key in known if key in ("N_c", "D_c", "C_c")]
        if len(critical) == 1:
            known = {"X_c" if key in critical else key: each for key, each in known.items()}
        known |= {key: method[key] for key in ("n_exponent", "d_exponent") if key in method}
        if "objective" in method:
            known["objective"] = {"value": method["objective"]}
        for kind in kinds:
            largest = max(kind.values(), key=len)
            alike = known.keys() <= largest.keys() or known.keys() >= largest.keys()
            # Approaches 1 and 2 have exponents alone, which every law of N and D has too.
            if alike and ("objective" in known) == ("objective" in largest):
                kind[name] = known
                break
        else:
            kinds.append({name: known})
    return kinds


def _optima(result):
    optima = {k: m["optimum"] for k, m in result["methods"].items() if "optimum" in m}
    if not optima:
        return ""
    c = next(iter(optima.values()))["c"]
    names = list(dict.fromkeys(key for optimum in optima.values() for key in optimum if key != "c"))
    rows = [
        [labels.method(name), *(_cell(optimum.get(key), _digits(key)) for key in names)]
        for name, optimum in optima.items()
    ]
    heads = ["method", *map(labels.quantity, names)]
    return f"<h2>Every method's optimum of {labels.short(c)} FLOPs</h2>{_table(heads, rows)}"


def _frontier(result):
    """The first method's frontier, a row for each power of ten."""
    known = ((k, m["frontier"]) for k, m in result["methods"].items() if "frontier" in m)
    name, frontier = next(known, (None, None))
    if frontier is None:
        return ""
    what = "Best size and tokens" if "n" in frontier else "Lowest loss"
    return (
        f"<h2>{what}, by {labels.method(name)}</h2>{_frontier_table(frontier, result['largest_c'])}"
    )


def _frontier_table(frontier, largest):
    rows = []
    for at, c in enumerate(frontier["c"]):
        if abs(np.log10(c) - round(np.log10(c))) < 1e-6:
            beyond = "<small>beyond every run</small>" if c > largest else ""
            cells = [_cell(each, _digits(key)) for key, each in _along(frontier, at).items()]
            rows.append([f"{labels.short(c)}{beyond}", *cells])
    return _table(["C, FLOPs", *(labels.quantity(key) for key in frontier if key != "c")], rows)


def _downstream(result):
    found = result.get("downstream")
    if not found:
        return ""
    names = [*found["parameters"], "RMS error"]
    cells = [
        *(_cell(each) for each in found["parameters"].values()),
        _cell({"value": found["rms_error"]}),
    ]
    text = f"<h2>Accuracy on the task</h2><p>{_maths(found['law'])}</p>{_table(names, [cells])}"
    if "frontier" in found:
        by = f"<p>Of the best use of compute, by {labels.method(found['loss_by'])}:</p>"
        text += by + _frontier_table(found["frontier"], result["largest_c"])
    return text


def _held_out(result):
    found = result.get("validation")
    if not found or not found.get("methods"):
        return ""
    rows = [
        [labels.method(name), *(labels.number(100 * each, 3) for each in (
            method["rms_error"], method["mean_error"], method.get("inside")) if each is not None)]
        for name, method in found["methods"].items()
    ]  # fmt: skip
    return (
        f"<h2>Largest budgets predicted from the others</h2><p>{len(found['rows'])} runs were held "
        f"out, of up to {labels.short(found['times'])} times the compute of the rest.</p>"
        f"{_table(['method', 'RMS error, %', 'mean error, %', 'inside the interval, %'], rows)}"
    )


def _remarks(result):
    remarks = (result.get("comparison") or {}).get("remarks", [])
    items = "".join(f"<li>{_maths(labels.prose(remark))}</li>" for remark in remarks)
    return f"<h2>Where methods part or err</h2><ul>{items}</ul>" if items else ""


def _drawn(shown):
    return "".join(
        f"<h2>{html.escape(picture.title)}</h2><figure>{svg}"
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture, svg in shown
    )


def _refused(result):
    every = {**result["refused"], **(result.get("validation") or {}).get("refused", {})}
    refused = [
        [", ".join(map(labels.method, names)), _maths(labels.prose(why))]
        for why, names in labels.by_reason(every).items()
    ]
    for name, method in result["methods"].items():
        reasons: dict[str, int] = {}
        for budget in method.get("budgets", []):
            if budget.get("refused"):
                reasons[budget["refused"]] = reasons.get(budget["refused"], 0) + 1
        for why, count in reasons.items():
            rows = f"{count} of {len(method['budgets'])} budgets: {html.escape(why)}"
            refused.append([labels.method(name), rows])
    if not refused:
        return ""
    return f"<h2>What was not fitted, and why</h2>{_table(['method', 'why'], refused, 'words')}"


def _everything(result, points, rows):
    cells = [
        [labels.method(method) or "all", html.escape(quantity),
         *(labels.number(v, 6) if _is_number(v) else "" for v in values)]
        for method, quantity, *values in rows
        if not re.match(r"(predicted|columns\.\w+)\[", quantity)  # those of the second table
    ]  # fmt: skip
    header, *runs = _point_rows(result, points)
    runs = [[labels.number(value, 5) for value in run] for run in runs]
    return (
        '<section class="screen"><h2>Every number</h2>'
        f"<details><summary>{len(cells)} numbers of fit.json</summary>"
        f"{_table(['method', 'quantity', 'value', 'low', 'high'], cells)}</details>"
        f"<details><summary>{len(runs)} runs, measured and predicted</summary>"
        f"{_table(header, runs)}</details></section>"
    )


def _digits(quantity):
    return 4 if quantity == "loss" else 3  # its differences are small


def _cell(number, digits=3):
    if number is None:
        return "–"
    intervals = (labels.interval(number.get(k), digits) for k in ("interval", "noise_interval"))
    below = "".join(f"<small>{bounds}</small>" for bounds in intervals if bounds)
    return labels.number(number["value"]) + below


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _maths(text: str) -> str:
    """N_opt ∝ C^a and the like as HTML, with letters raised and lowered."""
    text = re.sub(r"\b([^\W\d_])_([A-Za-z]+)", r"\1<sub>\2</sub>", html.escape(text))
    return re.sub(r"\^(\w+(?:<sub>\w+</sub>)?|\([^()]*\))", r"<sup>\1</sup>", text)
