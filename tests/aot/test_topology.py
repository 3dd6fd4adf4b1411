"""Names of TPU slices, and what the table of chips says, against the TPU's compiler."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from t5x_lite.aot import chips, topology
from t5x_lite.errors import UserError


# MaxText's table (accelerator_to_spec_map.py) of names, as libtpu calls them, with their chips.
@pytest.mark.parametrize(
    ("name", "libtpu", "count", "wraps"),
    [
        ("v4-8", "v4:2x2x1", 4, (False,) * 3),
        ("v4-128", "v4:4x4x4", 64, (True,) * 3),
        ("v5e-16", "v5e:4x4", 16, (False,) * 2),
        ("v5litepod-128", "v5e:8x16", 128, (False, True)),
        ("v5e-256", "v5e:16x16", 256, (True,) * 2),
        ("v5p-16", "v5:2x2x2", 8, (False,) * 3),
        ("v5p-128", "v5:4x4x4", 64, (True,) * 3),
        ("v5p-512", "v5:4x8x8", 256, (True,) * 3),
        ("v5p-12288", "v5:16x16x24", 6144, (True,) * 3),
        ("v6e-256", "v6e:16x16", 256, (True,) * 2),
        ("2xv5e-256", "v5e:16x16", 512, (True,) * 2),
    ],
)
def test_cloud_names(name, libtpu, count, wraps):
    found = topology.find(name)
    assert f"{found.libtpu}:{'x'.join(map(str, found.shape))}" == libtpu
    assert (found.chips, found.wraps) == (count, wraps)
    assert found.slices == (2 if name.startswith("2x") else 1)


@pytest.mark.parametrize(
    "name", ["v4-8", "v5e-1", "v5e-8", "v5p-16", "v6e-1", "2xv5e-4", "3xv5p-8"]
)
def test_libtpu_knows_them_with_one_device_a_chip(tpu, name):
    found = topology.find(name)
    devices = found.devices()
    assert len(devices) == found.chips
    assert chips.of_device(devices[0].device_kind) is found.chip
    slices = {getattr(device, "slice_index", None) or 0 for device in devices}
    assert slices == set(range(found.slices))
    places = {tuple(device.coords[: len(found.shape)]) for device in devices}
    assert len(places) == math.prod(found.shape)


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4"])
def test_capacity_is_what_the_compiler_goes_by(tpu, uncached, name):
    found = topology.find(name)
    where = SingleDeviceSharding(found.devices()[0])
    large = jax.ShapeDtypeStruct((2**35,), jnp.float32, sharding=where)  # 128 GiB
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
        jax.jit(jnp.negative).lower(large).compile()
    available = re.search(r"available HBM \(([\d.]+)G\)", str(refused.value))[1]
    assert found.chip.capacity == int(float(available) * 2**30)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-127", r"of v5p there are v5p-\{8,16,32,64,128,"),
        ("v5e-2", r"of v5e there are v5e-\{1,4,8,16,"),
        ("v7x-8", r"unknown topology 'v7x-8'; there are v4-\{.*\}; v5e-\{.*2xv5e-256"),
        ("h100", "unknown topology 'h100'; there are"),
        ("0xv5e-4", "unknown topology"),
        ("2xv4-8", "between slices of|sends between slices isn't published"),
    ],
)
def test_unknown_names_list_the_known(name, said):
    with pytest.raises(UserError, match=said):
        topology.find(name)


def test_without_libtpu_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no libtpu.*pip install 't5x_lite\[tpu\]'"):
        topology.find("v5e-4").devices()


def test_the_longest_kind_wins():
    assert chips.of_device("TPU v5 lite") is chips.TPUS["v5e"]
    assert chips.of_device("TPU v5") is chips.of_device("TPU v5p") is chips.TPUS["v5p"]
    assert chips.of_device("TPU v6 lite") is chips.TPUS["v6e"]
    assert chips.of_device("NVIDIA H100 80GB HBM3").peak["bfloat16"] == 989e12
    assert chips.of_device("abacus") is None


def test_links_add_up_to_what_a_pod_is_published_to_bisect():
    """Google's pages: 24 TB/s for v4's 16 × 16 × 16, 1.6 and 3.2 for the 16 × 16 of v5e and v6e."""
    for kind, links, published in (
        ("v4", 2 * 16**2, 24e12),
        ("v5e", 32, 1.6e12),
        ("v6e", 32, 3.2e12),
    ):
        assert links * chips.TPUS[kind].network.link == pytest.approx(published, rel=0.07)
