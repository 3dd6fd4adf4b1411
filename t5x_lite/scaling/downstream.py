"""From loss to accuracy: a sigmoid between chance and a ceiling, and capability against compute.

A law predicts the loss, and the sigmoid the accuracy of that loss (Grattafiori et al. 2024, §3.2.1;
Gadre et al. 2024 take an exponential, which is the sigmoid's one end).
"""

import dataclasses

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import laws
from t5x_lite.scaling.laws import Columns, Values
from t5x_lite.scaling.minimise import minimise

LAW = "floor + (ceiling − floor) / (1 + exp(slope · (loss − middle)))"
_NUDGE = 1e-5
_STARTS = 40


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """Accuracy as a function of the loss.

    Attributes:
      parameters: floor, ceiling, slope and middle.
      samples: the same over bootstraps.
      weak: those that the points don't identify, with the reason.
      error: root of the mean square of what is left.
    """

    parameters: dict[str, float]
    samples: dict[str, np.ndarray]
    weak: dict[str, str]
    error: float


def fit(
    columns: Columns,
    *,
    chance: float | None = None,
    weights: np.ndarray | None = None,
    seed: int = 0,
) -> Sigmoid:
    """The sigmoid of least squares.

    Args:
      columns: "loss", and "accuracy" between 0 and 1, NaN where it wasn't measured.
      chance: the floor, if it is known.
      weights: of bootstraps, [bootstraps, points].
      seed: of the starts.

    Raises:
      UserError: too few points, or a chance that isn't below what was measured.
    """
    there = np.isfinite(columns["accuracy"])
    loss, accuracy = columns["loss"][there], columns["accuracy"][there]
    need = 5 - (chance is not None)
    if len(np.unique(loss)) < need:
        raise UserError(
            f"accuracy by loss has {need - 1} parameters, and there are {len(np.unique(loss))} "
            f"losses with an accuracy; give at least {need}."
        )
    if chance is not None and not 0 <= chance < accuracy.max():
        raise UserError(
            f"chance={chance:g} must be at least 0 and below the best accuracy, {accuracy.max():g}."
        )
    problem = _Problem(loss, accuracy, chance)
    found, values = minimise(problem.objective(None), problem.starts(np.random.default_rng(seed)))
    best = found[np.argmin(values)]
    samples: dict[str, np.ndarray] = {}
    if weights is not None and len(weights):
        again, _ = minimise(
            problem.objective(weights[:, there]), np.repeat(best[None], len(weights), 0)
        )
        samples = problem.parameters(again)
    names = ("ceiling", "slope", "middle", "floor")[: len(best)]
    weak = laws.flat(problem.slopes(best[None])[0], names)
    one = {name: float(v[0]) for name, v in problem.parameters(best[None]).items()}
    if one["ceiling"] > accuracy.max() + 0.5 * (accuracy.max() - one["floor"]):
        weak.setdefault("ceiling", f"the best accuracy, {accuracy.max():.3g}, is far below it")
    return Sigmoid(one, samples, weak, float(np.sqrt(2 * values.min() / len(loss))))


def accuracy(parameters: Values, loss: np.ndarray | float) -> np.ndarray | float:
    """The accuracy that goes with a loss."""
    p = parameters
    return p["floor"] + (p["ceiling"] - p["floor"]) * _logistic(p["slope"] * (p["middle"] - loss))


def _logistic(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


class _Problem:
    """θ is the ceiling's logit between floor and 1, log slope, middle, and the floor's logit.

    A floor that isn't given lies below half of the accuracies.
    """

    def __init__(self, loss, accuracy, chance):
        self.loss, self.accuracy, self.chance = loss, accuracy, chance

    def starts(self, rng):
        low, high = self.loss.min(), self.loss.max()
        width = max(high - low, 1e-6)
        columns = [
            rng.uniform(-2, 4, _STARTS),
            np.log(rng.uniform(1, 12, _STARTS) / width),
            rng.uniform(low - 0.5 * width, high, _STARTS),
        ]
        if self.chance is None:
            columns.append(rng.uniform(-5, 0, _STARTS))
        return np.stack(columns, axis=1)

    def parameters(self, theta_mp):
        if self.chance is None:
            floor = np.median(self.accuracy) * _logistic(theta_mp[:, 3])
        else:
            floor = np.full(len(theta_mp), self.chance)
        ceiling = floor + (1 - floor) * _logistic(theta_mp[:, 0])
        slope = np.exp(np.clip(theta_mp[:, 1], -20, 20))
        return {"floor": floor, "ceiling": ceiling, "slope": slope, "middle": theta_mp[:, 2]}

    def predicted(self, theta_mp):
        p = {name: values[:, None] for name, values in self.parameters(theta_mp).items()}
        return accuracy(p, self.loss)

    def slopes(self, theta_mp):
        steps = _NUDGE * np.eye(theta_mp.shape[1])
        columns = [self.predicted(theta_mp + s) - self.predicted(theta_mp - s) for s in steps]
        return np.stack(columns, axis=-1) / (2 * _NUDGE)

    def objective(self, weights_mn):
        def compute(theta_mp, rows):
            weight = 1.0 if weights_mn is None else weights_mn[rows]
            error_mn, slopes = self.predicted(theta_mp) - self.accuracy, self.slopes(theta_mp)
            weighted = weight * error_mn
            gradient = np.einsum("mn,mnp->mp", weighted, slopes)
            scale = np.ones_like(error_mn) * weight
            hessian = np.matmul((scale[:, :, None] * slopes).transpose(0, 2, 1), slopes)
            return 0.5 * np.sum(weighted * error_mn, axis=1), gradient, hessian

        return compute
