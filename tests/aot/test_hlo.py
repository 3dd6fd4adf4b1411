"""Collectives as read from HLO: of programs whose exchanges are known, by both compilers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.aot.hlo import Collective, collectives, summary
from t5x_lite.errors import UserError

SIZES = {"data": 2, "model": 4}


def mesh_of(devices):
    grid = [devices[4 * row : 4 * row + 4] for row in range(2)]
    return Mesh(grid, tuple(SIZES), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(params=["cpu", "tpu"])
def mesh(request):
    if request.param == "cpu":
        return mesh_of(jax.devices())
    return mesh_of(request.getfixturevalue("tpu")("v5e:2x4"))


@pytest.fixture
def compiled(mesh, uncached):
    """`compiled(body, in_spec, out_spec, *shapes)`: collectives of a shard_map over both axes."""

    def run(body, specs, out, *shapes):
        mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        inputs = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        ]
        return collectives(jax.jit(mapped).lower(*inputs).compile().as_text())

    return run


P = PartitionSpec
ROWS = P("data", "model")


def the(found, kind):
    assert {each.kind for each in found} == {kind}
    assert len(found) == 1
    return found[0]


def test_an_all_gather_along_an_axis(compiled):
    found = the(
        compiled(
            lambda x: jax.lax.all_gather(x, "model", tiled=True), (ROWS,), P("data"), (16, 512)
        ),
        "all-gather",
    )
    assert (found.bytes, found.times) == (4 * 8 * 128 * 4, 1)
    assert found.axes(SIZES) == ("model",)
    assert set(map(frozenset, found.groups)) == {frozenset(range(4)), frozenset(range(4, 8))}
    assert found.source.endswith("all_gather")


def test_an_all_reduce_along_each_axis_and_along_both(compiled):
    for axes in (("data",), ("model",), ("data", "model")):
        out = P(*(None if axis in axes else axis for axis in SIZES))
        found = the(
            compiled(lambda x, a=axes: jax.lax.psum(x, a), (ROWS,), out, (16, 512)), "all-reduce"
        )
        assert found.bytes == 8 * 128 * 4
        assert found.axes(SIZES) == axes


def test_a_reduce_scatter_is_one_on_both_compilers(compiled):
    def scatter(x):
        return jax.lax.psum_scatter(x, "model", scatter_dimension=0, tiled=True)

    # The TPU's compiler makes an all-reduce and a slice of a small one.
    shape = (1024, 1024)
    found = the(compiled(scatter, (P("data"),), P(("data", "model")), shape), "reduce-scatter")
    assert (found.bytes, found.axes(SIZES)) == (512 * 1024 * 4, ("model",))


def test_a_permutation_has_pairs(compiled):
    def turn(x):
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    found = the(compiled(turn, (ROWS,), ROWS, (16, 512)), "collective-permute")
    assert set(found.groups) == {(n, (n + 4) % 8) for n in range(8)}
    assert (found.bytes, found.axes(SIZES)) == (8 * 128 * 4, ("data",))


def test_what_loops_repeat_is_counted_as_often(compiled):
    """Three times five, whether the compiler says how often a loop runs (CPU) or not (TPU)."""

    def body(x):
        def inner(_, x):
            return jnp.sin(jax.lax.psum(x, "model"))

        def outer(x, _):
            return jax.lax.ppermute(jax.lax.fori_loop(0, 5, inner, x), "data", [(0, 1), (1, 0)]), ()

        return jax.lax.scan(outer, x, length=3)[0]

    found = compiled(body, (ROWS,), ROWS, (16, 512))
    assert {(each.kind, each.times) for each in found} == {
        ("all-reduce", 15), ("collective-permute", 3)
    }  # fmt: skip


def test_nothing_is_sent_where_nothing_is_split(compiled):
    assert compiled(lambda x: jnp.sin(x) @ x.T, (ROWS,), P("data"), (16, 512)) == []


def write(instruction, more=""):
    return f"""HloModule m
{more}
ENTRY %main (p: f32[2,8]) -> f32[2,8] {{
  %p = f32[2,8]{{1,0:T(8,128)S(1)}} parameter(0)
  %i = s32[4]{{0}} parameter(1)
  {instruction}
}}
"""


GROUPS = {
    "{{0,1,2,3},{4,5,6,7}}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "[4,2]<=[2,4]T(1,0)": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=2,'b'=4] {'b'}": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "mesh['a'=2,'b'=4] {'a'}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=2,'b'=4] {'a','b'}": (tuple(range(8)),),
    "mesh['a'=8] {'a':(1)2}": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "mesh['a'=8] {'a':(2)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}": ((0, 2), (1, 3)),
}


@pytest.mark.parametrize("written", GROUPS)
def test_groups_however_they_are_written(written):
    text = write(f"ROOT %r = f32[2,8]{{1,0}} all-reduce(%p), replica_groups={written}, to_apply=%a")
    assert collectives(text)[0].groups == GROUPS[written]


def test_started_and_awaited_is_once_and_several_arrays_are_one_collective():
    text = write(
        "%s = (f32[2,8]{1,0}, s32[4]{0}, f32[8,8]{1,0}, s32[16]{0}) all-gather-start(%p, "
        "/*index=1*/%i), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, "
        'metadata={op_name="jit(f)/g"}'
        "\n  ROOT %d = (f32[8,8]{1,0}, s32[16]{0}) all-gather-done(%s)"
    )
    groups = ((0, 1, 2, 3), (4, 5, 6, 7))
    shapes = ("f32[2,8]", "s32[4]")
    assert collectives(text) == [
        Collective("all-gather", 4 * (64 + 16), shapes, groups, 1, "jit(f)/g")
    ]


def test_groups_of_one_device_exchange_nothing():
    groups = "{{0},{1}}"
    text = write(f"ROOT %r = f32[2,8]{{1,0}} all-reduce(%p), replica_groups={groups}, to_apply=%a")
    assert collectives(text) == []


def test_sizes_of_types():
    line = "ROOT %r = {0} all-to-all(%x), replica_groups={{{{0,1}}}}"
    for kind, size in (
        ("bf16[4]", 8),
        ("pred[4]", 4),
        ("s4[4]", 2),
        ("f8e4m3fn[4]", 4),
        ("u64[]", 8),
    ):
        text = write(f"%x = {kind}{{0}} parameter(2)\n  " + line.format(kind))
        assert collectives(text)[0].bytes == size, kind


def test_what_cannot_be_read_is_refused():
    with pytest.raises(UserError, match="no HLO module"):
        collectives("not found")
    with pytest.raises(UserError, match="unknown way to write groups of devices: <=7"):
        collectives(write("ROOT %r = f32[2,8]{1,0} all-reduce(%p), replica_groups=<=7, a=b"))
    loop = """
%again (t: (s32[])) -> pred[] {
  %t = (s32[]) parameter(0)
  ROOT %r = pred[] custom-call(%t), custom_call_target="who_knows"
}
%step (t: (s32[])) -> (s32[]) {
  ROOT %t = (s32[]) parameter(0)
}
"""
    with pytest.raises(UserError, match=r"loop w runs an unknown number of times: .* no constant"):
        collectives(write("ROOT %w = (s32[]) while(%p), condition=%again, body=%step", loop))


def test_a_summary_adds_up_what_goes_along_each_axis():
    def one(kind, size, times, groups):
        return Collective(kind, size, (), groups, times, "")

    model, data = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7))
    found = [
        one("all-reduce", 10, 3, model),
        one("all-reduce", 5, 1, model),
        one("all-reduce", 7, 1, data),
    ]
    assert summary(found, SIZES) == [
        ("all-reduce", "model", 4, 35), ("all-reduce", "data", 1, 7)
    ]  # fmt: skip
