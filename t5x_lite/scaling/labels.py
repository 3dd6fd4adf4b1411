"""How a fit's methods, quantities and numbers are written for a reader."""

import math
import re
from collections.abc import Mapping, Sequence

METHODS = {
    "approach_1": "approach 1 (envelope)",
    "approach_2_parabola": "approach 2 (parabola)",
    "approach_2_akima": "approach 2 (Akima)",
    "approach_3": "approach 3",
    "approach_3_tied": "approach 3 (α = β)",
    "variable_projection": "variable projection",
    "data_constrained": "repeated tokens",
    "sparse": "sparse models",
    "kaplan_nd": "Kaplan (N and D)",
    "kaplan_n": "Kaplan (N)",
    "kaplan_n_floor": "Kaplan (N, with E)",
    "kaplan_d": "Kaplan (D)",
    "kaplan_d_floor": "Kaplan (D, with E)",
    "kaplan_c": "Kaplan (C)",
    "kaplan_c_floor": "Kaplan (C, with E)",
    "downstream": "accuracy",
    "validation": "held-out budgets",
}
QUANTITIES = {
    "alpha": "α",
    "beta": "β",
    "alpha_N": "α_N",
    "alpha_D": "α_D",
    "n_exponent": "a of N_opt ∝ C^a",
    "d_exponent": "b of D_opt ∝ C^b",
    "n": "N, parameters",
    "d": "D, tokens",
    "tokens_per_parameter": "tokens per parameter",
    "loss": "loss, nats",
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def method(name: str) -> str:
    """A method's name in words."""
    return METHODS.get(name, name.replace("_", " "))


def quantity(name: str) -> str:
    """A quantity's name as papers write it, with its unit."""
    return QUANTITIES.get(name, name)


def number(value: float | int | None, digits: int = 4) -> str:
    """A number to some digits: 0.3473, 2143, 12,345 or 1.296×10²²; a count as it is."""
    if value is None or math.isnan(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    if value == 0:
        text = "0"
    elif -4 <= int(power) < digits:
        text = f"{value:#.{digits}g}".rstrip(".")
    elif digits <= int(power) < 6:
        text = f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:.0f}"
    else:
        text = f"{mantissa}×10{str(int(power)).translate(_RAISED)}"
    return text.replace("-", "−")


def short(value: float | int) -> str:
    """A round number as briefly as it can be: 1.5, 500, 10²¹ or 2×10²¹."""
    if 1e-3 < value < 1e4:
        return f"{value:.3g}"
    mantissa, power = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}×10{str(int(power)).translate(_RAISED)}".removeprefix("1×")


def interval(bounds: Sequence[float | None] | None, digits: int = 4) -> str:
    """Both ends of an interval, or nothing."""
    if bounds is None or None in bounds:
        return ""
    low, high = bounds
    if low == high:
        return "fixed"
    return f"{number(low, digits)} … {number(high, digits)}"


def beside(found: dict, digits: int = 3) -> str:
    """A value of fit.json and its interval in one power of ten: 7.90×10⁷ (7.16 … 8.97)."""
    value, bounds = found["value"], found.get("interval")
    text = number(value, digits)
    if not interval(bounds) or value is None:
        return text
    power = 10.0 ** int(f"{value:e}".split("e")[1]) if "×" in text else 1.0
    if min(bounds) < 0.01 * abs(value) or max(bounds) > 100 * abs(value):
        return f"{text} ({interval(bounds, digits)})"
    return f"{text} ({interval([bound / power for bound in bounds], digits)})"


def by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """Each reason, once, with the methods that weren't fitted for it."""
    found: dict[str, list[str]] = {}
    for name, why in refused.items():
        found.setdefault(why, []).append(name)
    return found


def prose(text: str) -> str:
    """A sentence with methods and numbers as a reader writes them."""
    for name in sorted(METHODS, key=len, reverse=True):
        if "_" in name:
            text = re.sub(rf"\b{name}\b", METHODS[name], text)
    return raised(text)


def raised(text: str) -> str:
    """A sentence with 10²¹ in place of 1e+21."""
    return re.sub(r"\b\d[\d.]*e[+-]\d+", lambda found: short(float(found[0])), text)
