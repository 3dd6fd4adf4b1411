"""A fit's pictures, in order: of budgets, laws, checks, powers and accuracy.

Reads of `fit.fit`'s result "largest_c", "flops_per_token_and_parameter", "methods", "validation"
and "downstream"; of a method "law", "parameters", "predicted", "rows", "n_exponent", "budgets",
"envelope", "frontier" and "optimum". A picture whose numbers are absent is left out.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_lite.scaling.pictures import budgets, capability, checks, powers, surfaces, variants
from t5x_lite.scaling.pictures.parts import Picture
from t5x_lite.scaling.points import Points

# By the name of its file: a function of a result and its points, None where there is nothing.
PICTURES = {
    "isoflop": budgets.isoflop_curves,
    "compute": budgets.compute,
    "surface": surfaces.surface,
    "sparse": variants.sparse,
    "repeated": variants.repeated,
    "residuals": surfaces.residuals,
    "frontier": budgets.frontier,
    "agreement": checks.agreement,
    "validation": checks.validation,
    "predicted": checks.predicted,
    "kaplan": powers.kaplan_powers,
    "downstream": capability.capability,
}


def draw(result: dict[str, Any], points: Points) -> Iterator[Picture]:
    """Every picture that the result allows; needs matplotlib, in `rc_context(drawing.LOOK)`."""
    result = _with_nan(result)
    for picture in PICTURES.values():
        drawn = picture(result, points)
        if drawn is not None:
            drawn.figure.draw_without_rendering()
            drawn.figure.set_layout_engine("none")  # laid out once, whatever it is saved as
            yield drawn


def _with_nan(part: Any) -> Any:
    """NaN in place of the None that JSON has for it; a budget without a minimum keeps its None."""
    if isinstance(part, dict):
        return {
            key: np.nan if key == "value" and each is None else _with_nan(each)
            for key, each in part.items()
        }
    if isinstance(part, list):
        return [np.nan if each is None else _with_nan(each) for each in part]
    return part
