"""Laws that are sums of powers, and their fit: Huber loss of the log-loss, every start at once.

A law's terms are exp(z_k) with z_k linear in its parameters θ, so that log L = log Σ exp(z_k)
(Hoffmann et al. 2022, §3.3, eq. 3). Chinchilla's law, Kaplan's of one variable with or without a
floor, tied exponents and the law of sparse models (Frantar et al. 2023, §3) differ in the table of
their coefficients alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling.minimise import minimise

Columns = Mapping[str, np.ndarray]  # of equal length: "n", "d", "c", "density", "unique", "loss"
Values = Mapping[str, float | np.ndarray]  # of parameters
# Of residuals of the log-loss, [points]: errors of as many draws as are wanted, [draws, points].
Noise = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Term:
    """scale · Π column^(sign · exponent); without exponents, a constant.

    Attributes:
      scale: name of its coefficient.
      powers: of (column, exponent's name, sign).
    """

    scale: str
    powers: tuple[tuple[str, str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Law:
    """L = Σ terms. Coefficients are positive; an exponent's name may occur in several terms."""

    name: str
    terms: tuple[Term, ...]

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the coefficients, a term each."""
        return tuple(term.scale for term in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for _, name, _ in term.powers))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns it reads besides the loss."""
        return tuple(dict.fromkeys(column for term in self.terms for column, _, _ in term.powers))

    def predict(self, parameters: Values, columns: Columns) -> np.ndarray:
        """The loss at each row of the columns; parameters [M, 1] give [M, rows]."""
        total = np.zeros(np.shape(columns[self.columns[0]]))
        for term in self.terms:
            value = np.asarray(parameters[term.scale], float)
            for column, exponent, sign in term.powers:
                value = value * np.asarray(columns[column], float) ** (sign * parameters[exponent])
            total = total + value
        return total


def _power(scale: str, column: str, exponent: str) -> Term:
    return Term(scale, ((column, exponent, -1),))


CHINCHILLA = Law("E + A/N^α + B/D^β", (
    _power("A", "n", "alpha"), _power("B", "d", "beta"), Term("E"),
))  # fmt: skip
TIED = Law("E + A/N^α + B/D^α", (
    _power("A", "n", "alpha"), _power("B", "d", "alpha"), Term("E"),
))  # fmt: skip
SPARSE = Law("(a_S (1−S)^b_S + c_S)/N^b_N + a_D/D^b_D + c", (
    Term("a_S", (("density", "b_S", 1), ("n", "b_N", -1))),
    _power("c_S", "n", "b_N"), _power("a_D", "d", "b_D"), Term("c"),
))  # fmt: skip


def of_one(column: str, floor: bool) -> Law:
    """Kaplan et al. 2020, eq. 1.1-1.3: a power of one column, with or without a constant."""
    power = _power("A", column, "alpha")
    name = f"{'E + ' if floor else ''}A/{column.upper()}^α"
    return Law(name, (power, Term("E")) if floor else (power,))


@runtime_checkable
class Predicts(Protocol):
    """A law of any form."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns it reads besides the loss."""
        ...

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the parameters without units."""
        ...

    def predict(self, parameters: Values, columns: Columns) -> np.ndarray:
        """The loss at each row of the columns."""
        ...


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A law's parameters, and how well they are known.

    Attributes:
      law: the law.
      parameters: name to value.
      objective: the sum of Huber losses.
      samples: name to its values over bootstraps, empty without any.
      weak: parameters that the points don't identify, with the reason.
      noisy: name to its values where the law is true and the losses err, empty without any.
    """

    law: Predicts
    parameters: dict[str, float]
    objective: float
    samples: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    weak: dict[str, str] = dataclasses.field(default_factory=dict)
    noisy: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """A parameter's percentile interval over the bootstraps."""
        return percentiles(self.samples[name], level)


def percentiles(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the samples; of those that are finite."""
    tail = 50 * (1 - level)
    low, high = np.percentile(samples[np.isfinite(samples)], [tail, 100 - tail])
    return float(low), float(high)


def interval(kind: str, samples: np.ndarray | None) -> dict[str, list[float]]:
    """{kind: [low, high]}, or nothing without samples."""
    if samples is None or not np.isfinite(samples).any():
        return {}
    return {kind: list(percentiles(samples))}


def fit(
    law: Law,
    columns: Columns,
    *,
    delta: float = 1e-3,
    starts: int = 200,
    bootstraps: int = 0,
    seed: int = 0,
    weights: np.ndarray | None = None,
    noise: Noise | None = None,
) -> Fitted:
    """The law's parameters that minimise Σ Huber_δ(log L − log prediction).

    Newton's method with the exact Hessian, from `starts` random places; each bootstrap, a draw of
    as many points with replacement, begins at the optimum.

    Args:
      law: what to fit.
      columns: the law's columns and "loss", positive.
      delta: of the Huber loss; a large one gives least squares of the log-loss.
      starts: how many; the best one's result counts.
      bootstraps: how many; 0 for none.
      seed: of starts and draws.
      weights: of bootstraps given from outside, [bootstraps, points]; None draws them.
      noise: the errors with which the law's own losses are fitted again.

    Raises:
      UserError: fewer points than parameters, or one that has no logarithm.
    """
    problem = _Problem(law, columns, delta)
    rng = np.random.default_rng(seed)
    found, values = minimise(problem.objective(None), problem.starts(rng, starts))
    best = found[np.argmin(values)]
    samples: dict[str, np.ndarray] = {}
    if bootstraps or weights is not None:
        count = problem.count
        if weights is None:
            weights = rng.multinomial(count, np.full(count, 1 / count), size=bootstraps)
        again, _ = minimise(problem.objective(weights), np.repeat(best[None], len(weights), 0))
        samples = problem.parameters(again)
    noisy: dict[str, np.ndarray] = {}
    if noise is not None:
        exact = problem.log_predicted(best)
        losses = exact + noise(problem.log_loss - exact)
        again, _ = minimise(problem.objective(None, losses), np.repeat(best[None], len(losses), 0))
        noisy = problem.parameters(again)
    parameters = {name: float(v[0]) for name, v in problem.parameters(best[None]).items()}
    return Fitted(law, parameters, float(np.min(values)), samples, problem.weak(best), noisy)


def weak(law: Law, columns: Columns, parameters: Mapping[str, float]) -> dict[str, str]:
    """Parameters that the points don't identify near those given, with the reason."""
    problem = _Problem(law, columns, delta=1.0)
    return problem.weak(problem.theta(parameters))


class _Problem:
    """A law on points. Columns are centred in their logarithm, or scales and exponents correlate.

    θ is the scales' logarithms, then the exponents.
    """

    def __init__(self, law: Law, columns: Columns, delta: float):
        self.law, self.delta = law, delta
        logs = {name: logarithms(name, columns[name]) for name in (*law.columns, "loss")}
        self.log_loss, self.count = logs["loss"], len(logs["loss"])
        names = (*law.scales, *law.exponents)
        if self.count < len(names) + 1:
            raise UserError(
                f"{law.name} has {len(names)} parameters, and there are {self.count} points; "
                f"give at least {len(names) + 1}."
            )
        # The density's scale is 1: its power is one factor of a term, not a term of its own.
        self.centres = {
            name: 0.0 if name == "density" else float(np.mean(logs[name])) for name in law.columns
        }
        self.design_knp = np.zeros((len(law.terms), self.count, len(names)))
        for k, term in enumerate(law.terms):
            self.design_knp[k, :, k] = 1.0
            for column, exponent, sign in term.powers:
                at = names.index(exponent)
                self.design_knp[k, :, at] += sign * (logs[column] - self.centres[column])

    def starts(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Shares of the loss between a hundredth and all, exponents between 0.05 and 1.5."""
        scales, exponents = len(self.law.scales), len(self.law.exponents)
        centre = np.mean(self.log_loss)
        return np.concatenate(
            [
                centre + rng.uniform(np.log(0.01), 0, (count, scales)),
                np.exp(rng.uniform(np.log(0.05), np.log(1.5), (count, exponents))),
            ],
            axis=1,
        )

    def log_predicted(self, theta_p: np.ndarray) -> np.ndarray:
        """The law's log-loss at each point."""
        return np.logaddexp.reduce(self.design_knp @ theta_p, axis=0)

    def objective(self, weights_mn: np.ndarray | None, log_loss_mn: np.ndarray | None = None):
        """Value, gradient and Hessian; `weights_mn` counts each point of each problem.

        `log_loss_mn` are each problem's own losses, in place of those that were measured.
        """
        design, delta = self.design_knp, self.delta
        outer_knpq = np.einsum("knp,knq->knpq", design, design)
        shape = outer_knpq.shape

        def compute(theta_mp, rows):
            z_mkn = np.einsum("knp,mp->mkn", design, theta_mp)
            top = z_mkn.max(axis=1, keepdims=True)
            share_mkn = np.exp(z_mkn - top)
            total = share_mkn.sum(axis=1, keepdims=True)
            share_mkn /= total
            measured = self.log_loss if log_loss_mn is None else log_loss_mn[rows]
            error_mn = (np.log(total) + top)[:, 0] - measured
            size = np.abs(error_mn)
            each = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
            weight = 1.0 if weights_mn is None else weights_mn[rows]
            slope = weight * np.clip(error_mn, -delta, delta)
            curve = weight * (size <= delta)
            jacobian_mnp = np.einsum("mkn,knp->mnp", share_mkn, design)
            gradient = np.einsum("mn,mnp->mp", slope, jacobian_mnp)
            weighted = (curve - slope)[:, :, None] * jacobian_mnp
            hessian = np.matmul(weighted.transpose(0, 2, 1), jacobian_mnp)
            bend_mkn = (slope[:, None] * share_mkn).reshape(len(rows), -1)
            hessian += (bend_mkn @ outer_knpq.reshape(-1, shape[2] * shape[3])).reshape(
                -1, *shape[2:]
            )
            return np.sum(weight * each, axis=1), gradient, hessian

        return compute

    def parameters(self, theta_mp: np.ndarray) -> dict[str, np.ndarray]:
        """Scales and exponents in the columns' own units."""
        law, scales = self.law, len(self.law.scales)
        exponents = dict(zip(law.exponents, theta_mp[:, scales:].T, strict=True))
        found = {}
        for k, term in enumerate(law.terms):
            log_scale = theta_mp[:, k]
            for column, exponent, sign in term.powers:
                log_scale = log_scale - sign * exponents[exponent] * self.centres[column]
            with np.errstate(over="ignore"):
                found[term.scale] = np.exp(log_scale)
        return found | exponents

    def theta(self, parameters: Mapping[str, float]) -> np.ndarray:
        """The inverse of `parameters`, of one set; a scale of zero counts as next to nothing."""
        law = self.law
        logs = [np.log(max(parameters[term.scale], 1e-300)) for term in law.terms]
        for k, term in enumerate(law.terms):
            for column, exponent, sign in term.powers:
                logs[k] += sign * parameters[exponent] * self.centres[column]
        return np.array([*logs, *(parameters[name] for name in law.exponents)])

    def weak(self, theta_p: np.ndarray) -> dict[str, str]:
        """Terms that vanish, and flat directions: what the points say nothing about."""
        design, law = self.design_knp, self.law
        z_kn = design @ theta_p
        share_kn = np.exp(z_kn - np.logaddexp.reduce(z_kn, axis=0))
        weak = {
            term.scale: "its term is nowhere above a millionth of the loss"
            for term, share in zip(law.terms, share_kn, strict=True)
            if share.max() < 1e-6
        }
        jacobian = np.einsum("kn,knp->np", share_kn, design)
        return flat(jacobian, (*law.scales, *law.exponents)) | weak


def flat(jacobian_np: np.ndarray, names: Sequence[str]) -> dict[str, str]:
    """Parameters that can change together without changing any prediction, with the reason."""
    found: dict[str, str] = {}
    _, sizes, directions = np.linalg.svd(jacobian_np, full_matrices=False)
    for size, direction in zip(sizes, directions, strict=True):
        if size < 1e-5 * sizes[0]:
            for name in np.array(names)[np.abs(direction) > 0.3]:
                found.setdefault(str(name), "others can make up for a change of it")
    return found


def vague(samples: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, str]:
    """Parameters whose interval spans a factor of five or more, with the reason."""
    found: dict[str, str] = {}
    for name in names:
        if not np.isfinite(samples[name]).any():
            continue
        low, high = percentiles(samples[name])
        if not high < 5 * low:
            found[name] = f"its 95% interval spans {low:.3g} to {high:.3g}"
    return found


def logarithms(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Of a column whose values must be positive and finite."""
    values = np.asarray(values, float)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        raise UserError(
            f"point {bad[0] + 1} has {name}={values[bad[0]]:g}; all must be positive and finite."
        )
    return np.log(values)
