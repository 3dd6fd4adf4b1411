"""Learning-rate schedules: functions of the step (0 is the first), pure and jittable.

All warm up linearly over `warmup_steps`, reach `peak`, and then differ. They are written in float32
from the step, so that the rate of a step doesn't depend on where a run was resumed.

Numbers of steps below 1 are shares of `steps`, so that a shorter run keeps its schedule's form.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from t5x_lite.errors import UserError

Schedule = Callable[[Array | int], Array]


def _with_warmup(peak: float | int, warmup_steps: int, after: Callable[[Array], Array]) -> Schedule:
    """peak · min(1, (step + 1) / warmup_steps) · after(step): the first step already learns."""
    if peak < 0:
        raise UserError(f"peak={peak} must not be negative.")

    def schedule(step: Array | int) -> Array:
        now = jnp.asarray(step).astype(jnp.float32)
        warmup = jnp.minimum(1.0, (now + 1) / max(warmup_steps, 1))
        return peak * warmup * after(now)

    return schedule


def _whole(name: str, value: float | int, steps: int | None = None, least: int = 0) -> int:
    """A number of steps; a `value` below 1 is that share of `steps`, rounded down to `least`.

    Raises:
        UserError: negative or broken numbers, and shares where the schedule has no `steps`.
    """
    if not 0 < value < 1:
        if value < 0 or not float(value).is_integer():
            raise UserError(f"{name}={value} must be whole steps, or a share of steps below 1.")
        return int(value)
    if steps is None:
        raise UserError(f"{name}={value} is a share, but this schedule has no steps to share; give "
                        f"whole steps, such as {name}=100.")  # fmt: skip
    # 0.29 · 100 is 28.999…: a share that is whole but for rounding counts as whole.
    return max(least, math.floor(round(value * steps, 6)))


def _require_decay(steps: int, warmup_steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1.")
    if warmup_steps >= steps:
        raise UserError(
            f"warmup_steps={warmup_steps} leaves none of steps={steps} to decay; "
            f"set warmup_steps below {steps}, or to a share such as 0.05."
        )


def constant(peak: float | int, warmup_steps: float | int = 0) -> Schedule:
    """`peak` throughout."""
    return _with_warmup(peak, _whole("warmup_steps", warmup_steps), jnp.ones_like)


def linear(
    peak: float | int,
    steps: int,
    warmup_steps: float | int = 0,
    final_fraction: float | int = 0.0,
) -> Schedule:
    """A straight line from `peak` to final_fraction · peak at `steps` (BERT)."""
    warmup_steps = _whole("warmup_steps", warmup_steps, steps)
    _require_decay(steps, warmup_steps)

    def after(now: Array) -> Array:
        progress = jnp.clip((now - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
        return 1 - (1 - final_fraction) * progress

    return _with_warmup(peak, warmup_steps, after)


def rsqrt(peak: float | int, warmup_steps: float | int) -> Schedule:
    """peak · sqrt(warmup_steps / step) after the warm-up (Vaswani et al. 2017, §5.3).

    T5 (Raffel et al. 2020, §3.1.2) decays so too, but holds the peak instead of warming up.
    """
    warmup_steps = _whole("warmup_steps", warmup_steps)
    if warmup_steps < 1:
        raise UserError(f"rsqrt decays relative to its warm-up: warmup_steps={warmup_steps} < 1.")

    def after(now: Array) -> Array:
        return jnp.sqrt(warmup_steps / jnp.maximum(now + 1, warmup_steps))

    return _with_warmup(peak, warmup_steps, after)


def cosine(
    peak: float | int,
    steps: int,
    warmup_steps: float | int = 0,
    final_fraction: float | int = 0.1,
) -> Schedule:
    """Half a cosine from `peak` to final_fraction · peak at `steps` (Chinchilla)."""
    warmup_steps = _whole("warmup_steps", warmup_steps, steps)
    _require_decay(steps, warmup_steps)

    def after(now: Array) -> Array:
        progress = jnp.clip((now - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return _with_warmup(peak, warmup_steps, after)


def warmup_stable_decay(
    peak: float | int,
    steps: int,
    warmup_steps: float | int,
    decay_steps: float | int,
    final_fraction: float | int = 0.0,
) -> Schedule:
    """`peak` until the last `decay_steps`, then 1 - sqrt(progress) (Hägele et al. 2024, §3)."""
    warmup_steps = _whole("warmup_steps", warmup_steps, steps)
    decay_steps = _whole("decay_steps", decay_steps, steps, least=1)
    if not 0 < decay_steps <= steps - warmup_steps:
        raise UserError(
            f"decay_steps={decay_steps} must lie between 1 and steps - warmup_steps = "
            f"{steps - warmup_steps}."
        )

    def after(now: Array) -> Array:
        progress = jnp.clip((now - (steps - decay_steps)) / decay_steps, 0.0, 1.0)
        return 1 - (1 - final_fraction) * jnp.sqrt(progress)

    return _with_warmup(peak, warmup_steps, after)
