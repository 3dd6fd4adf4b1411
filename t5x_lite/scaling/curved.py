"""Laws of any form with positive parameters, and their fit: as laws.py's, by Gauss and Newton.

Errors beyond the Huber loss's δ are weighed down in place of the exact Hessian (Holland and Welsch
1977), and derivatives are central differences: enough for laws of up to eight parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling import laws
from t5x_lite.scaling.laws import Columns, Fitted, Noise, Values
from t5x_lite.scaling.minimise import minimise

_NUDGE = 1e-5  # of a parameter's logarithm
_ENOUGH = 1e-8  # of a draw's objective
_LIMIT = 60.0  # of its size

Logs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A law by its logarithm.

    Attributes:
      name: its formula.
      columns: what it reads besides the loss.
      parameters: their names; all are positive.
      exponents: those of them that have no units.
      log_loss: of logarithms of the parameters, [M, 1], and of the columns, [N]: log L, [M, N].
      starts: of a generator, a number M and the mean log-loss: logarithms of parameters, [M, P].
      rescale: of parameters in units of the columns' given scales: those in the columns' own units.
      units: columns that share one scale, such as tokens and unique tokens.
    """

    name: str
    columns: tuple[str, ...]
    parameters: tuple[str, ...]
    exponents: tuple[str, ...]
    log_loss: Callable[[Logs, Logs], np.ndarray]
    starts: Callable[[np.random.Generator, int, float], np.ndarray]
    rescale: Callable[[dict[str, np.ndarray], dict[str, float]], dict[str, np.ndarray]]
    units: dict[str, str] = dataclasses.field(default_factory=dict)

    def predict(self, parameters: Values, columns: Columns) -> np.ndarray:
        """The loss at each row of the columns."""
        logs = {name: np.log(np.asarray(columns[name], float)) for name in self.columns}
        values = {name: np.log(np.asarray(parameters[name], float)) for name in self.parameters}
        return np.exp(self.log_loss(values, logs))


def fit(
    law: Curve,
    columns: Columns,
    *,
    delta: float = 1e-3,
    starts: int = 50,
    bootstraps: int = 0,
    seed: int = 0,
    weights: np.ndarray | None = None,
    noise: Noise | None = None,
) -> Fitted:
    """As `laws.fit`: the parameters that minimise Σ Huber_δ(log L − log prediction)."""
    problem = _Problem(law, columns, delta)
    rng = np.random.default_rng(seed)
    begin = law.starts(rng, starts, float(np.mean(problem.log_loss)))
    # A wide Huber loss first: with a narrow one a start that is far away has no curvature.
    begin, _ = minimise(problem.objective(None, delta=max(delta, 0.1)), begin, steps=60)
    found, values = minimise(problem.objective(None), begin)
    best = found[np.argmin(values)]
    samples: dict[str, np.ndarray] = {}
    if bootstraps or weights is not None:
        count = problem.count
        if weights is None:
            weights = rng.multinomial(count, np.full(count, 1 / count), size=bootstraps)
        begin = np.repeat(best[None], len(weights), 0)
        again, _ = minimise(problem.objective(weights), begin, tolerance=_ENOUGH)
        samples = problem.parameters(again)
    noisy: dict[str, np.ndarray] = {}
    if noise is not None:
        exact = problem.log_predicted(best[None])[0]
        losses = exact + noise(problem.log_loss - exact)
        begin = np.repeat(best[None], len(losses), 0)
        again, _ = minimise(problem.objective(None, losses), begin, tolerance=_ENOUGH)
        noisy = problem.parameters(again)
    parameters = {name: float(v[0]) for name, v in problem.parameters(best[None]).items()}
    weak = laws.flat(problem.slopes(best[None])[0], law.parameters)
    return Fitted(law, parameters, float(np.min(values)), samples, weak, noisy)


class _Problem:
    """A law on points, each column in units of its geometric mean."""

    def __init__(self, law: Curve, columns: Columns, delta: float):
        self.law, self.delta = law, delta
        logs = {name: laws.logarithms(name, columns[name]) for name in (*law.columns, "loss")}
        self.log_loss, self.count = logs.pop("loss"), len(columns["loss"])
        need = len(law.parameters) + 1
        if self.count < need:
            raise UserError(
                f"{law.name} has {need - 1} parameters, and there are {self.count} points; give at "
                f"least {need}."
            )
        means = {name: float(np.mean(logs[law.units.get(name, name)])) for name in logs}
        self.logs = {name: values - means[name] for name, values in logs.items()}
        self.scales = {name: float(np.exp(mean)) for name, mean in means.items()}

    def log_predicted(self, theta_mp: np.ndarray) -> np.ndarray:
        """The law's log-loss at each point of each problem."""
        theta_mp = np.clip(theta_mp, -_LIMIT, _LIMIT)
        values = dict(zip(self.law.parameters, theta_mp.T[:, :, None], strict=True))
        with np.errstate(over="ignore", under="ignore"):
            return self.law.log_loss(values, self.logs)

    def slopes(self, theta_mp: np.ndarray) -> np.ndarray:
        """∂ log L / ∂θ, [M, N, P]."""
        steps = _NUDGE * np.eye(theta_mp.shape[1])
        up, down = ([self.log_predicted(theta_mp + sign * step) for step in steps]
                    for sign in (1, -1))  # fmt: skip
        return np.stack([(a - b) / (2 * _NUDGE) for a, b in zip(up, down, strict=True)], axis=-1)

    def objective(self, weights_mn, log_loss_mn=None, delta=None):
        """Value, gradient and the Hessian's majoriser; `weights_mn` counts each point."""
        delta = delta or self.delta

        def compute(theta_mp, rows):
            measured = self.log_loss if log_loss_mn is None else log_loss_mn[rows]
            weight = 1.0 if weights_mn is None else weights_mn[rows]
            error_mn = self.log_predicted(theta_mp) - measured
            size = np.abs(error_mn)
            each = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
            slopes = self.slopes(theta_mp)
            gradient = np.einsum("mn,mnp->mp", weight * np.clip(error_mn, -delta, delta), slopes)
            bend = weight * np.minimum(1.0, delta / np.maximum(size, 1e-300))
            hessian = np.matmul((bend[:, :, None] * slopes).transpose(0, 2, 1), slopes)
            return np.sum(weight * each, axis=1), gradient, hessian

        return compute

    def parameters(self, theta_mp: np.ndarray) -> dict[str, np.ndarray]:
        """Values in the columns' own units."""
        found = np.exp(np.clip(theta_mp, -_LIMIT, _LIMIT)).T
        with np.errstate(over="ignore"):
            scaled = dict(zip(self.law.parameters, found, strict=True))
            return self.law.rescale(scaled, self.scales)
