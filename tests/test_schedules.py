"""Learning rates at the places where a schedule changes its course."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import schedules
from t5x_lite.errors import UserError

PEAK = 0.5


def rates(schedule, *steps):
    return np.asarray(schedule(jnp.asarray(steps))).tolist()


def test_constant_warms_up_and_stays():
    # The first of ten steps has a tenth of the peak, the tenth has it whole.
    found = rates(schedules.constant(PEAK, 10), 0, 4, 9, 10, 10_000)
    assert found == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5])
    assert rates(schedules.constant(PEAK), 0, 7) == [0.5, 0.5]


def test_linear_falls_in_a_straight_line():
    found = rates(schedules.linear(PEAK, 110, 10), 0, 9, 10, 60, 85, 110, 500)
    assert found == pytest.approx([0.05, 0.5, 0.5, 0.25, 0.125, 0.0, 0.0])
    found = rates(schedules.linear(PEAK, 110, 10, final_fraction=0.2), 60, 110, 500)
    assert found == pytest.approx([0.3, 0.1, 0.1])


def test_rsqrt_falls_by_half_when_the_steps_are_four_times_as_many():
    found = rates(schedules.rsqrt(PEAK, 100), 0, 49, 99, 399, 1599)
    assert found == pytest.approx([0.005, 0.25, 0.5, 0.25, 0.125])


def test_cosine_falls_along_half_a_wave():
    found = rates(schedules.cosine(PEAK, 110, 10), 0, 10, 35, 60, 110, 500)
    # A quarter of the way: cos(π/4) above the middle between the peak and a tenth of it.
    quarter = 0.275 + 0.225 * math.cos(math.pi / 4)
    assert found == pytest.approx([0.05, 0.5, quarter, 0.275, 0.05, 0.05])


def test_warmup_stable_decay_holds_and_then_cools_by_the_square_root():
    schedule = schedules.warmup_stable_decay(PEAK, 100, 10, 36)
    found = rates(schedule, 0, 10, 40, 64, 73, 80, 100, 500)
    # 9, 16 and 36 of 36 steps into the decay: 1 - 1/2, 1 - 2/3, 0
    assert found == pytest.approx([0.05, 0.5, 0.5, 0.5, 0.25, 0.5 / 3, 0.0, 0.0], abs=1e-7)
    to_a_fifth = schedules.warmup_stable_decay(PEAK, 100, 10, 36, final_fraction=0.2)
    assert rates(to_a_fifth, 73, 100) == pytest.approx([0.3, 0.1])


ALL = {
    "constant": schedules.constant(PEAK, 7),
    "linear": schedules.linear(PEAK, 50, 7),
    "rsqrt": schedules.rsqrt(PEAK, 7),
    "cosine": schedules.cosine(PEAK, 50, 7),
    "warmup_stable_decay": schedules.warmup_stable_decay(PEAK, 50, 7, 20),
}


@pytest.mark.parametrize("name", ALL)
def test_rates_are_float32_whatever_the_step_is(name):
    schedule = ALL[name]
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(60))
    assert traced.dtype == schedule(3).dtype == jnp.float32
    np.testing.assert_allclose(traced, rates(schedule, *range(60)), atol=1e-7)
    assert float(schedule(41)) == pytest.approx(float(traced[41]), abs=1e-7)
    assert np.argmax(traced) in (6, 7)  # the peak stands where the warm-up ends …
    assert np.all(np.diff(traced[:7]) > 0)
    assert np.all(np.diff(traced[7:]) <= 0)  # … and nowhere else


@pytest.mark.parametrize("name", ["linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("steps", [1, 3, 40, 100_000])
def test_numbers_below_one_are_shares_of_the_steps(name, steps):
    make = getattr(schedules, name)
    decay = {"decay_steps": 0.2} if name == "warmup_stable_decay" else {}
    whole = {"decay_steps": max(1, steps // 5)} if decay else {}
    by_share = make(PEAK, steps, 0.05, **decay)
    by_steps = make(PEAK, steps, steps // 20, **whole)
    places = [0, 1, steps // 20, steps // 2, steps * 9 // 10, steps]
    assert rates(by_share, *places) == rates(by_steps, *places)


def test_a_share_that_is_whole_but_for_rounding_is_whole():
    # 0.29 · 100 = 28.999999999999996
    assert float(schedules.linear(PEAK, 100, 0.29)(28)) == PEAK
    assert float(schedules.linear(PEAK, 100, 0.29)(27)) < PEAK


def test_whole_numbers_may_be_floats():
    assert float(schedules.linear(PEAK, 100, 10.0)(4)) == 0.25
    assert float(schedules.cosine(1, 100, 1)(0)) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.rsqrt(PEAK, 0.05), "warmup_steps=0.05 is a share"),
        (lambda: schedules.constant(PEAK, 0.05), "warmup_steps=0.05 is a share"),
        (lambda: schedules.rsqrt(PEAK, 0), "warmup_steps=0"),
        (lambda: schedules.linear(PEAK, 100, 100), "set warmup_steps below 100"),
        (lambda: schedules.cosine(PEAK, 40, 100), "set warmup_steps below 40"),
        (lambda: schedules.cosine(PEAK, 0), "steps=0 must be at least 1"),
        (lambda: schedules.linear(PEAK, 100, 2.5), "warmup_steps=2.5"),
        (lambda: schedules.linear(PEAK, 100, -1), "warmup_steps=-1"),
        (lambda: schedules.linear(PEAK, 100, -0.5), "warmup_steps=-0.5"),
        (lambda: schedules.linear(PEAK, 100, math.nan), "warmup_steps=nan"),
        (lambda: schedules.constant(-PEAK), "peak=-0.5"),
        (lambda: schedules.warmup_stable_decay(PEAK, 100, 10, 0), "decay_steps=0"),
        (lambda: schedules.warmup_stable_decay(PEAK, 100, 10, 91), "decay_steps=91"),
        (lambda: schedules.warmup_stable_decay(PEAK, 100, 0.5, 0.6), "decay_steps=60"),
    ],
)
def test_impossible_schedules_are_refused_in_one_line(make, words):
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
