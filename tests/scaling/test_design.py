"""Grids: what they consist of, what is within reach, and what a trial on a known law says."""

import dataclasses
import math
import re

import gin
import numpy as np
import pytest

from t5x_lite import cli
from t5x_lite.errors import UserError
from t5x_lite.scaling import design, rates, shapes, simulation
from t5x_lite.scaling.design import Cell, Law, Measured, Planned


def measured(n, row_tokens=100):
    return Measured({"WIDTH": round(n)}, float(n), round(n), row_tokens, 6.0 * n * row_tokens)


SHAPES = [measured(n) for n in np.geomspace(1e5, 1e7, 41)]
PLAIN = {"law": "0.01", "length": 100, "batch_size": 10}


# --- grids ---


def test_isoflop_sizes_are_even_around_the_best_of_each_budget():
    law = Law()
    cells = design.isoflop([1e18, 1e20], 5, 4.0, law.best_size)
    sizes = np.reshape([cell.n for cell in cells], (2, 5))
    np.testing.assert_allclose(sizes[:, 2], [law.best_size(1e18), law.best_size(1e20)])
    np.testing.assert_allclose(sizes[:, 1:] / sizes[:, :-1], 2.0)
    assert [cell.c for cell in cells] == [1e18] * 5 + [1e20] * 5
    with pytest.raises(UserError, match="needs at least 4"):
        design.isoflop([1e18], 3, 4.0, law.best_size)


def test_the_best_size_is_the_minimum_along_a_budget():
    law = Law()
    n = np.geomspace(1e7, 1e11, 100_001)
    np.testing.assert_allclose(
        law.best_size(1e21), n[np.argmin(law.loss(n, 1e21 / (6 * n)))], rtol=1e-3
    )


def test_the_other_grids():
    assert design.kaplan([1.0, 2.0], [5.0]) == [Cell(1.0, d=5.0), Cell(2.0, d=5.0)]
    cells = design.envelope([10.0], 80.0, horizons=3)
    assert [cell.d / cell.n for cell in cells] == [20, 40, 80]
    assert design.spaced(1.0, 100.0, 3) == pytest.approx([1, 10, 100])
    with pytest.raises(UserError, match="LOW:HIGH:COUNT"):
        design.spaced(100.0, 1.0, 3)


def test_runs_meet_their_budgets_within_one_percent():
    cells = design.isoflop([1e13, 1e14], 7, 3.0, lambda c: math.sqrt(c / 120))
    runs = design.realise(cells, SHAPES, **PLAIN)
    assert len(runs) == 14
    for cell, run in zip(cells, runs, strict=True):
        assert abs(run.c / cell.c - 1) <= 0.01
        assert abs(math.log(run.n / cell.n)) < 0.06  # half a rung
        assert run.c == pytest.approx(6 * run.n * run.d)
        assert run.d == run.values["STEPS"] * run.values["BATCH_SIZE"] * 100


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(UserError, match=r"within 1% of the budget of 1e\+10 .* 17 steps"):
        design.realise([Cell(1e5, c=1e10)], SHAPES, **PLAIN)
    design.check_budgets([Cell(1.3e7)], SHAPES)
    with pytest.raises(UserError, match=r"no shape has about 2e\+07 .* nearest has 1e\+07"):
        design.check_budgets([Cell(2e7)], SHAPES)


def test_a_trunk_saves_where_it_cools_down():
    (run,) = design.realise([Cell(1e6, d=1e6)], SHAPES, cool_down=0.2, **PLAIN)
    assert (run.values["STEPS"], run.values["CHECKPOINT_PERIOD"]) == (1000, 800)


# --- rates ---


def test_laws_of_rates_and_batches():
    # DeepSeek LLM, §3.1: at 1e20 FLOPs about 1e-3 and 1 M tokens; figure 3
    found = rates.settings("deepseek", 1e9, 1e10, 1e20)
    assert found.learning_rate == pytest.approx(0.3118 * 10 ** (-2.5))
    assert found.batch_tokens == pytest.approx(0.2920 * 10**6.542)
    # twice the tokens, at a size: a higher rate and larger batches
    small, large = (rates.settings("step_law", 1e9, d, 1e20) for d in (1e10, 2e10))
    assert large.learning_rate / small.learning_rate == pytest.approx(2**0.307)
    assert large.batch_tokens / small.batch_tokens == pytest.approx(2**0.571)
    assert rates.settings("3e-3", 1.0, 1.0, 1.0) == rates.Settings(3e-3, None)
    with pytest.raises(UserError, match="neither a law"):
        rates.settings("chinchila", 1e9, 1e10, 1e20)
    with pytest.raises(UserError, match="doesn't reach that far"):
        rates.settings("kaplan", 1e13, 1e10, 1e20)


def test_batches_are_whole_rows_and_leave_enough_steps():
    assert rates.rows(2048.0, 128, 1e9) == 16
    assert rates.rows(10_000.0, 128, 1e9) == 80  # multiples of a quarter of a power of two
    assert rates.rows(1e9, 128, 1e6) * 128 * 200 <= 1.1e6


# --- shapes ---


@pytest.mark.parametrize("family", shapes.RULES)
def test_shapes_rise_evenly_and_keep_their_aspect(family):
    rule = dataclasses.replace(shapes.RULES[family], aspect=32.0, head_dim=16)
    found = shapes.ladder(rule, 1e5, 1e8, 1024)
    sizes = np.array([shape.estimate for shape in found])
    assert sizes[0] < 2e5
    assert sizes[-1] > 1e8
    assert (sizes[1:] / sizes[:-1]).min() >= 1.12
    assert (sizes[1:] / sizes[:-1]).max() < 1.9
    for shape in found:
        assert shape.width == shape.heads * 16
        if shape.layers > rule.least_layers:
            assert 32 / 1.61 <= shape.width / shape.layers <= 32 * 1.61
    with pytest.raises(UserError, match="no shape with heads of 16"):
        shapes.ladder(rule, 1e2, 2e2, 1024)


# --- trials ---


def grid(law=Law(), sizes=5, span=4.0):  # noqa: B008 - frozen
    cells = design.isoflop([1e18, 1e19, 1e20], sizes, span, law.best_size)
    return [Planned({}, cell.n, cell.c / (6 * cell.n), cell.c) for cell in cells]


def by_key(found):
    return {(one.method, one.quantity): one for one in found}


def test_without_noise_the_law_comes_back():
    found = by_key(simulation.recover(grid(), 1e21, noise=1e-9, trials=2))
    for quantity in ("exponent", "n", "loss"):
        one = found["approach_3", quantity]
        assert abs(one.bias) < 1e-3, quantity
        assert one.low == pytest.approx(one.truth, rel=1e-3)
        assert one.failed == 0


def test_noise_widens_what_is_found_and_holds_the_truth():
    narrow, wide = (by_key(simulation.recover(grid(), 1e21, noise=noise, trials=10))
                    for noise in (2e-4, 2e-3))  # fmt: skip
    for key in (("approach_3", "n"), ("approach_2_parabola", "exponent")):
        assert wide[key].high - wide[key].low > 3 * (narrow[key].high - narrow[key].low)
    assert wide["approach_3", "n"].low < Law().best_size(1e21) < wide["approach_3", "n"].high


def test_parabolas_are_biased_where_alpha_is_not_beta():
    law = Law(alpha=0.5, A=10_000.0)
    found = by_key(simulation.recover(grid(law, 7, 8.0), 1e21, law=law, noise=1e-9, trials=2))
    assert abs(found["approach_2_parabola", "n"].bias) > 0.05
    assert abs(found["approach_3", "n"].bias) < 1e-3


def test_the_choice_spends_what_it_may():
    options = {"centre": Law().best_size, "trials": 4}
    best = simulation.choose(1e18, 1e20, 7e20, 1e21, **options)
    budgets = design.spaced(1e18, 1e20, best.budgets)
    assert sum(budgets) * best.sizes <= 7e20
    assert best.tried >= 3
    with pytest.raises(UserError, match=r"smallest grid takes 5\.55e"):
        simulation.choose(1e18, 1e20, 5e20, 1e21, **options)


# --- the verb ---


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    yield tmp_path
    gin.clear_config()


def test_a_design_is_a_sweep_that_can_be_run(inside, capsys):
    options = (
        "--budgets 1e11:2e11:2 --sizes 4 --span 1.5 --head_dim 8 --aspect 16 --trials 4 --seeds 2 "
        "--tokens_per_parameter 20 --batch_tokens 512 --held_out 2 --speed 1e10 --gin.LENGTH=64"
    )
    command = ["sweep", "design", "--gin_file", "sweeps/base/cpu_decoder.gin", "--out", "mine.gin"]
    command += options.split()
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    count = re.search(r"^(\d+) runs, ", said, re.MULTILINE)[1]
    assert 12 <= int(count) <= 16
    assert "hours on 1e+10 FLOP/s" in said
    assert "approach_3, exponent" in said
    assert "LENGTH = 64" in (inside / "mine.gin").read_text()
    assert cli.main(["sweep", "run", "--gin_file", "mine.gin", "--out", "x", "--dry_run"]) == 0
    assert f"{count} runs, " in capsys.readouterr().out
    for option, value, why in (
        ("--budgets", "1e11", "give LOW:HIGH:COUNT"),
        ("--law", "E:1", "give E=1.8"),
        ("--chip", "abacus", "no chip 'abacus'"),
        ("--rates", "mine", "neither a law"),
    ):
        assert cli.main([*command, option, value]) == 2
        assert why in capsys.readouterr().err
