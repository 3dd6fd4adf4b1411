"""The model of a step's time, against arithmetic on rings, lines and halves of a torus."""

import numpy as np
import pytest

from t5x_lite.aot import roofline, topology
from t5x_lite.aot.hlo import Collective


def places_of(target):
    return np.stack(np.unravel_index(np.arange(np.prod(target.shape)), target.shape), axis=1)


def one(kind, size, groups, **more):
    return Collective(kind, size, (), groups, 1, "", **more)


def ring(target, dim, at=0):
    """The chips along a dimension, the others' coordinates being `at`."""
    where = places_of(target)
    others = [d for d in range(len(target.shape)) if d != dim]
    return tuple(np.flatnonzero((where[:, others] == at).all(axis=1)).tolist())


POD, SMALL, CUBE = topology.find("v5e-256"), topology.find("v5e-16"), topology.find("v5p-128")
LINK = 50e9


def seconds(each, target):
    return roofline.inside(each, places_of(target), target)


def test_a_gather_round_a_ring_uses_both_directions_and_on_a_line_one():
    """All-gather: V / 2W on a ring (Austin et al. 2025, "How to scale your model", ch. 3)."""
    size, share = 2048 * 8192 * 2, 15 / 16
    group = (ring(POD, 0),)
    assert seconds(one("all-gather", size, group), POD) == pytest.approx(size * share / (2 * LINK))
    assert seconds(one("reduce-scatter", size, group), POD) == pytest.approx(
        size * share / (2 * LINK)
    )
    assert seconds(one("all-reduce", size, group), POD) == pytest.approx(size * share / LINK)
    line = (ring(SMALL, 1),)
    assert seconds(one("all-gather", size, line), SMALL) == pytest.approx(size * 3 / 4 / LINK)


def test_more_dimensions_are_more_links():
    size, all_chips = 10**9, ()
    assert seconds(one("all-gather", size, all_chips), POD) == pytest.approx(
        size * 255 / 256 / (4 * LINK))  # fmt: skip
    assert seconds(one("all-gather", size, all_chips), CUBE) == pytest.approx(
        size * 63 / 64 / (6 * 100e9))  # fmt: skip
    half = (ring(POD, 0)[:8],)  # not the whole ring: a line
    assert seconds(one("all-gather", size, half), POD) == pytest.approx(size * 7 / 8 / LINK)


def test_an_all_to_all_crosses_the_middle():
    """On a ring a quarter of what a gather of all devices' arrays would take (ibid.)."""
    size, group = 10**6, (ring(POD, 0),)
    gathered = one("all-gather", 16 * size, group)
    exchanged = seconds(one("all-to-all", size, group), POD)
    assert exchanged == pytest.approx(seconds(gathered, POD) / 4 / (15 / 16))
    assert seconds(one("all-to-all", size, ((0, 1),)), SMALL) == pytest.approx(size / 2 / LINK)


def test_a_permutation_takes_its_longest_way():
    size = 10**6
    around = tuple(zip(ring(POD, 0), (*ring(POD, 0)[1:], ring(POD, 0)[0]), strict=True))
    assert seconds(one("collective-permute", size, around), POD) == pytest.approx(size / LINK)
    along = tuple(zip(ring(SMALL, 0), (*ring(SMALL, 0)[1:], ring(SMALL, 0)[0]), strict=True))
    # From the end of a line back to its start.
    assert seconds(one("collective-permute", size, along), SMALL) == pytest.approx(3 * size / LINK)
    far = ((0, 255),)  # (15, 15): a step back along each dimension
    assert seconds(one("collective-permute", size, far), POD) == pytest.approx(2 * size / LINK)


def modelled(found, target=POD, flops=0.0, moved=0):
    return roofline.model(flops, moved, found, places_of(target), target)


def test_the_step_is_the_longest_of_what_goes_on_at_once_and_what_is_waited_for():
    group = (ring(POD, 0),)
    waited, beside = (one("all-gather", 16 * 10**9, group, overlaps=o) for o in (False, True))
    each = 15e9 / (2 * LINK)
    flops, moved = 256 * 197e12 * 0.1, int(819e9 * 0.05)
    found = modelled([waited, beside], POD, flops, moved)
    assert (found.compute, found.hbm) == pytest.approx((0.1, 0.05))
    assert (found.ici, found.awaited) == pytest.approx((2 * each, each))
    assert found.step == pytest.approx(max(0.1, each) + each)
    assert found.bound == "ici"
    alone = modelled([], POD, flops, moved)
    assert (alone.step, alone.bound) == (pytest.approx(0.1), "compute")
    assert modelled([], POD, flops / 4, moved).bound == "hbm"


def test_rings_that_turn_both_ways_share_no_link():
    chips = ring(POD, 0)
    forth = tuple(zip(chips, (*chips[1:], chips[0]), strict=True))
    back = tuple((b, a) for a, b in forth)
    turns = [one("collective-permute", 10**9, pairs, overlaps=True) for pairs in (forth, back)]
    once = 10**9 / LINK
    assert modelled(turns[:1]).ici == pytest.approx(once)
    assert modelled(turns).ici == pytest.approx(once)
    assert modelled([*turns, turns[0]]).ici == pytest.approx(2 * once)


def test_between_slices_each_chip_sends_its_share():
    target = topology.find("2xv5e-256")
    dcn = 6.4e12 / 8 / 256
    for kind, factor in (("all-reduce", 1), ("all-gather", 0.5), ("collective-permute", 1)):
        found = modelled([one(kind, 10**9, (), overlaps=True, slices=2)], target)
        assert found.dcn == pytest.approx(factor * 1e9 / dcn)
        assert (found.ici, found.bound) == (0.0, "dcn")
