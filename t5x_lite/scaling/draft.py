"""The verb `sweep design`: a grid, laid out, costed and tried on a known law, as a gin file."""

import dataclasses
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from t5x_lite.aot import chips
from t5x_lite.errors import UserError
from t5x_lite.scaling import design, shapes, simulation
from t5x_lite.scaling.design import Cell, Law, Measured, Planned
from t5x_lite.scaling.facts import facts
from t5x_lite.scaling.sweep import Configure, overrides, write_text
from t5x_lite.scaling.watch import short

METHODS = ("isoflop", "kaplan", "envelope", "trunk")
COOL_DOWN = 0.2  # of a trunk's runs (Hägele et al. 2024, §3: 10 to 20% suffice)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is wanted; ranges are LOW:HIGH:COUNT, even in their logarithm.

    Attributes:
      method: of `METHODS`.
      budgets: FLOPs, of "isoflop".
      n: parameters, of the others.
      d: tokens, of "kaplan".
      horizons: of "envelope" and "trunk": runs of each size, each twice as long as the one before.
      longest: tokens per parameter of the longest.
      sizes: of each budget.
      span: the largest size of a budget over its best.
      choose: FLOPs in all: takes the count of budgets, `sizes` and `span` that recover the law
        best for that.
      tokens_per_parameter: of the best size; None: as the law says.
      law: that is assumed, `E=1.8,A=400,…`.
      rates: of learning rate and batch, as in `rates.settings`.
      rate_factor: times that rate.
      batch_tokens: instead of the law's.
      seeds: runs of each point.
      held_out: times the largest compute, of a run to predict; None for none.
      target: times the largest compute, for which the trial predicts.
      aspect: width over layers.
      head_dim: of a head.
      noise: of log L, in the trial.
      trials: draws.
      chip: its name, as in `aot/chips.py`.
      chips: how many.
      mfu: share of their peak that is reached.
      speed: FLOP/s in all instead, as `train` shows it.
    """

    method: str = "isoflop"
    budgets: str | None = None
    n: str | None = None
    d: str | None = None
    horizons: int = 4
    longest: float = 80.0
    sizes: int = 7
    span: float = 4.0
    choose: float | None = None
    tokens_per_parameter: float | None = None
    law: str | None = None
    rates: str = "deepseek"
    rate_factor: float = 1.0
    batch_tokens: float | None = None
    seeds: int = 1
    held_out: float | None = None
    target: float = 10.0
    aspect: float | None = None
    head_dim: int | None = None
    noise: float = 0.005
    trials: int = 200
    chip: str | None = None
    chips: int = 1
    mfu: float = 0.4
    speed: float | None = None


def draft(
    configure: Configure,
    files: Sequence[str],
    given: Sequence[str],
    out: str,
    options: Options,
    command: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Writes a sweep's file, and prints what it costs and how well it recovers the law.

    Args:
      configure: of the base gin files, which read the macros of `sweeps/shapes/`.
      files: those files, for the sweep to include.
      given: NAME=VALUE on top of them.
      out: the gin file to write.
      options: the rest.
      command: what was typed, for the file's head.
      console: where to print.

    Raises:
      UserError: options that don't go together, a budget that no shape reaches within 1%, or a
        grid that no method can be fitted to.
    """
    console = console or Console(width=None if Console().is_terminal else 120)
    speed = _speed(options)
    law = _law(options.law)
    options = _chosen(options, law, console)
    cells = _cells(options, law)
    extra = [] if options.held_out is None else [_held_out(options, law, cells)]
    measured, length, batch_size = _measure(configure, options, [*cells, *extra])
    design.check_budgets([*cells, *extra], measured)
    settings = {
        "law": options.rates, "length": length, "batch_size": batch_size,
        "rate_factor": options.rate_factor, "batch_tokens": options.batch_tokens,
        "cool_down": COOL_DOWN if options.method == "trunk" else None,
    }  # fmt: skip
    runs = design.realise(cells, measured, **settings)
    held_out = design.realise(extra, measured, **settings)
    target = options.target * max(run.c for run in runs)
    repeated = [run for run in runs for _ in range(options.seeds)]
    found = simulation.recover(repeated, target, law=law, noise=options.noise,
                               trials=options.trials)  # fmt: skip
    lines = [*_cost(runs, held_out, options, speed), *_recovery(found, target, options)]
    if len(runs) < len(cells):
        missing = f"{len(cells) - len(runs)} of {len(cells)}"
        lines.insert(0, f"{missing} runs have no shape of their own, and are left out.")
    _show(runs, held_out, console)
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
    head = [*_wrapped(shlex.join(command)), "", *lines, "Not run."]
    text = design.gin_text(
        Path(out).stem, head, files, runs, held_out, seeds=options.seeds,
        trunk=options.method == "trunk", lines=[line.replace("=", " = ", 1) for line in given],
    )  # fmt: skip
    write_text(Path(out), text)
    console.print(f"{out}: t5x_lite sweep run --gin_file {out} --out DIR", soft_wrap=True)


# --- what is wanted ------------------------------------------------------------------------------


def _chosen(options: Options, law: Law, console: Console) -> Options:
    if options.choose is None:
        return options
    if options.method != "isoflop":
        raise UserError(f"--choose is for isoflop, not for {options.method}.")
    low, high, _ = _range("budgets", options.budgets, counted=False)
    best = simulation.choose(
        low, high, options.choose, options.target * high, centre=_centre(options, law), law=law,
        noise=options.noise,
    )  # fmt: skip
    console.print(
        f"chosen: {best.budgets} budgets, {best.sizes} sizes each, up to {best.span:g} times the "
        f"best and down to as little; of {best.tried} grids",
        highlight=False,
    )
    budgets = f"{low}:{high}:{best.budgets}"
    return dataclasses.replace(options, budgets=budgets, sizes=best.sizes, span=best.span)


def _cells(options: Options, law: Law) -> list[Cell]:
    if options.method == "isoflop":
        budgets = _spaced("budgets", options.budgets)
        return design.isoflop(budgets, options.sizes, options.span, _centre(options, law))
    if options.method == "kaplan":
        return design.kaplan(_spaced("n", options.n), _spaced("d", options.d))
    if options.method in METHODS:
        return design.envelope(_spaced("n", options.n), options.longest, options.horizons)
    raise UserError(f"no method {options.method}; there are {', '.join(METHODS)}.")


def _centre(options: Options, law: Law) -> Callable[[float], float]:
    ratio = options.tokens_per_parameter
    return law.best_size if ratio is None else lambda c: math.sqrt(c / (6 * ratio))


def _held_out(options: Options, law: Law, cells: Sequence[Cell]) -> Cell:
    c = options.held_out * max(cell.c or 6 * cell.n * cell.d for cell in cells)
    return Cell(_centre(options, law)(c), c=c)


def _spaced(name: str, text: str | None) -> list[float]:
    return design.spaced(*_range(name, text))


def _range(name: str, text: str | None, counted: bool = True) -> tuple[float, float, int]:
    parts = (text or "").split(":")
    try:
        low, high = float(parts[0]), float(parts[1])
        count = int(parts[2]) if counted else 1
    except (ValueError, IndexError):
        form = "LOW:HIGH:COUNT" if counted else "LOW:HIGH"
        raise UserError(
            f"--{name} {text}: give {form}, such as 1e18:1e20{':5' * counted}."
        ) from None
    return low, high, count


def _law(text: str | None) -> Law:
    if text is None:
        return Law()
    try:
        parts = dict(part.split("=") for part in text.split(","))
        return Law(**{name.strip(): float(value) for name, value in parts.items()})
    except (ValueError, TypeError):
        raise UserError(f"--law {text}: give E=1.8,A=478,B=2143,alpha=0.35,beta=0.37.") from None


def _speed(options: Options) -> float | None:
    if options.chip is None:
        return options.speed
    return options.chips * options.mfu * chips.named(options.chip).peak["bfloat16"]


# --- what there is -------------------------------------------------------------------------------


def _measure(
    configure: Configure, options: Options, cells: Sequence[Cell]
) -> tuple[list[Measured], int, int]:
    """Shapes around the cells' sizes, counted; LENGTH and BATCH_SIZE of the files."""
    _, arguments = configure([])
    model = arguments["model"]
    rule = shapes.RULES[model.kind]
    changed = {"aspect": options.aspect, "head_dim": options.head_dim}
    rule = dataclasses.replace(rule, **{k: v for k, v in changed.items() if v is not None})
    low, high = (f(cell.n for cell in cells) for f in (min, max))
    measured = []
    for shape in shapes.ladder(rule, low, high, model.vocab_size):
        values = shape.values | ({"HEAD_DIM": rule.head_dim} if rule.stacks == 2 else {})
        try:
            found, _ = facts(*configure(overrides(values | {"BATCH_SIZE": 1})))
        except UserError as error:
            line = str(error).splitlines()[0]
            raise UserError(f"shape {values}: {line} (the base needs sweeps/shapes/ of its family "
                            f"after its model)") from error  # fmt: skip
        measured.append(Measured(values, found["n"], found["n_total"], found["batch_tokens"],
                                 found["step_flops"]))  # fmt: skip
    return measured, arguments["length"], arguments["batch_size"]


# --- what it costs, and what it finds ------------------------------------------------------------


def _cost(runs, held_out, options, speed) -> list[str]:
    total = options.seeds * sum(run.c for run in runs)
    extra = sum(run.c for run in held_out)
    note = "" if options.method != "trunk" else ", of which runs of one size share their way"
    line = f"{options.seeds * len(runs)} runs, {total:.3g} FLOPs{note}"
    if held_out:
        times = extra / max(run.c for run in runs)
        line += f", and {extra:.3g} held out, {times:.2g} times the largest"
    lines = [line + "."]
    if speed is not None:
        where = f"{options.chips} {options.chip} at {options.mfu:.0%} of their peak"
        where = where if options.chip else f"{speed:.3g} FLOP/s"
        lines.append(f"{(total + extra) / speed / 3600:,.3g} hours on {where}.")
    return lines


def _recovery(found, target, options) -> list[str]:
    law = options.law or "Chinchilla's law"
    lines = [
        f"Tried on {law}, noise {options.noise:g} of log L, {options.trials} draws; at "
        f"{target:.3g} FLOPs:"
    ]
    for one in found:
        if one.failed == 1:
            lines.append(f"  {one.method}, {one.quantity}: no answer")
            continue
        bias = f"{one.bias:+.3f}" if one.quantity == "exponent" else f"{one.bias:+.1%}"
        failed = f", no answer in {one.failed:.0%}" if one.failed else ""
        lines.append(
            f"  {one.method}, {one.quantity}: truth {one.truth:.4g}, bias {bias}, 95% of answers "
            f"in {one.low:.4g} … {one.high:.4g}{failed}"
        )
    return lines


def _show(runs: Sequence[Planned], held_out: Sequence[Planned], console: Console) -> None:
    table = Table("width", "layers", box=None, pad_edge=False)
    for name in ("N", "D", "D/N", "C", "steps", "rows", "rate"):
        table.add_column(name, justify="right")
    table.add_column("")
    for run in (*runs, *held_out):
        v: dict[str, Any] = run.values
        table.add_row(
            str(v["WIDTH"]), str(v["LAYERS"]), short(run.n), short(run.d), f"{run.d / run.n:.3g}",
            f"{run.c:.3e}", str(v["STEPS"]), str(v["BATCH_SIZE"]), f"{v['LEARNING_RATE']:g}",
            "held out" if any(run is one for one in held_out) else "",
        )  # fmt: skip
    console.print(table)


def _wrapped(text: str, width: int = 94) -> list[str]:
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + len(word) > width:
            lines.append(f"{line} \\")
            line = "   "
        line += f"{' ' if line else ''}{word}"
    return [*lines, line]
