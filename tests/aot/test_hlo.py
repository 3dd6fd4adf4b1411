"""Collectives as read from HLO: of programs whose exchanges are known, by both compilers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.aot.hlo import Collective, collectives, hbm_bytes, summary
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
        Collective("all-gather", 4 * (64 + 16), shapes, groups, 1, "jit(f)/g", overlaps=True)
    ]


def test_what_is_part_of_other_work_overlaps_and_a_fused_reduce_scatter_does_not():
    inside = """
%NAME (p: f32[2,8]) -> f32[2,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %r = f32[2,8]{1,0} all-reduce(%p), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%a
}"""
    for name, kind, overlaps in (
        ("all-reduce-scatter.1", "reduce-scatter", False),
        ("product", "all-reduce", True),
    ):
        line = f"ROOT %f = f32[2,8]{{1,0}} fusion(%p), kind=kCustom, calls=%{name}"
        found = collectives(write(line, inside.replace("NAME", name)))
        assert [(each.kind, each.overlaps) for each in found] == [(kind, overlaps)]


def test_between_slices_hosts_send_what_their_devices_share(tpu, uncached):
    """Of each kind; inside of a slice a sum's parts are summed first and gathered again."""
    devices = np.reshape(tpu("v5e:2x2", num_slices=2), (2, 4))
    mesh = Mesh(devices, ("slice", "inside"), axis_types=(AxisType.Auto,) * 2)
    both = P(("slice", "inside"))

    def body(x):
        turned = jax.lax.ppermute(x, "slice", [(0, 1), (1, 0)])
        gathered = jax.lax.all_gather(x, "slice", tiled=True)
        scattered = jax.lax.psum_scatter(x, "slice", tiled=True)
        return jax.lax.psum(x, ("slice", "inside")), turned, gathered, scattered

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=both, out_specs=(P(), both, P("inside"), both), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * 64, 128), jnp.float32, sharding=NamedSharding(mesh, both))
    found = collectives(jax.jit(mapped).lower(x).compile().as_text())
    own = 64 * 128 * 4
    across = {each.kind: each.bytes for each in found if each.slices == 2}
    assert across == {
        "all-reduce": own // 4, "collective-permute": own, "all-gather": 2 * own,
        "reduce-scatter": own,
    }  # fmt: skip
    assert all(each.overlaps for each in found if each.slices == 2)
    # Groups count a slice's devices.
    assert {each.axes({"inside": 4}) for each in found if each.slices == 1} == {("inside",)}


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


# --- memory


def layers_of(x, kernels, unroll):
    """Kernels [L, D, D], applied to x in turn, and the gradient with respect to them."""

    def value(kernels):
        return jnp.sum(
            jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels, unroll=unroll)[0]
        )

    return jax.grad(value)(kernels)


def memory(function, *shapes, devices=None):
    sharding = jax.sharding.SingleDeviceSharding((devices or jax.devices())[0])
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    return jax.jit(function).lower(*inputs).compile()


def test_memory_traffic_is_what_xla_counts_where_nothing_loops():
    def unrolled(x, kernels):
        for n in range(3):
            x = jax.nn.softmax(jnp.tanh(x @ kernels[n]) + x)
        return x.at[3].set(x[4]), jnp.sum(x)

    for function in (unrolled, lambda x, kernels: layers_of(x, kernels, unroll=True)):
        program = memory(function, (16, 64), (3, 64, 64))
        counted = program.cost_analysis()["bytes accessed"]
        assert hbm_bytes(program.as_text()) == pytest.approx(counted, rel=0.05)


def test_memory_traffic_of_a_loop_reads_a_slice_a_turn():
    """Not the whole stack of kernels in each of its turns, which would be ten times as much."""
    looped, unrolled = (
        hbm_bytes(memory(lambda x, k, n=n: layers_of(x, k, n), (16, 64), (10, 64, 64)).as_text())
        for n in (1, 10)
    )
    assert unrolled < looped < 2 * unrolled


def test_a_tpu_reads_its_arguments_and_writes_its_results(tpu, uncached):
    devices = tpu("v5e:1x1", chips_per_host_bounds=(1, 1, 1))

    def applied(x, kernels):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    program = memory(applied, (256, 1024), (8, 1024, 1024), devices=devices)
    held = program.memory_analysis()
    least = held.argument_size_in_bytes + held.output_size_in_bytes
    # What passes from turn to turn stays in the core's memory.
    assert hbm_bytes(program.as_text()) == pytest.approx(least, rel=0.05)


FUSED = """
%fused (a: f32[10,8], i: s32[]) -> f32[1,8] {
  %a = f32[10,8]{1,0} parameter(0)
  %b = f32[10,8]{1,0} bitcast(%a)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%b, %i, %z), dynamic_slice_sizes={1,8}
}
%updated (a: f32[10,8], u: f32[1,8], i: s32[]) -> f32[10,8] {
  %a = f32[10,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %s = f32[10,8]{1,0} dynamic-update-slice(%a, %u, %i, %z)
}
%both (a: f32[10,8], u: f32[1,8], i: s32[]) -> f32[10,8] {
  %a = f32[10,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %s = f32[10,8]{1,0} dynamic-update-slice(%a, %u, %i, %z)
  ROOT %n = f32[10,8]{1,0} negate(%s)
}
%again (t: s32[]) -> pred[] {
  %t = s32[] parameter(0)
  %n = s32[] constant(6)
  ROOT %r = pred[] compare(%t, %n), direction=LT
}
%step (t: s32[]) -> s32[] {
  %t = s32[] parameter(0)
  %p = f32[2,8]{1,0} constant({...})
  %q = f32[2,8]{1,0} negate(%p)
  ROOT %u = s32[] negate(%t)
}
%less (t: s32[]) -> s32[] {
  %t = s32[] parameter(0)
  ROOT %u = s32[] negate(%t)
}
"""
ROW, ALL = 4 * 8, 4 * 80
MOVES = {
    # %p lies in VMEM, %i in main memory.
    "ROOT %r = f32[2,8]{1,0} negate(%p)": 64,
    "ROOT %r = s32[4]{0} negate(%i)": 32,
    "ROOT %r = s32[4]{0:S(5)} copy(%i)": 16,
    "ROOT %r = s32[1]{0} slice(%i), slice={[0:1]}": 8,
    "ROOT %r = (s32[4]{0}, s32[4]{0}) tuple(%i, %i)": 0,
    "%a = f32[10,8]{1,0} constant({...})\n  %j = s32[] constant(0)": 0,
    "ROOT %r = f32[1,8]{1,0} fusion(%a, %j), kind=kLoop, calls=%fused": 2 * ROW + 4,
    "ROOT %r = f32[10,8]{1,0} fusion(%a, %u, %j), kind=kLoop, calls=%updated": 2 * ROW + 4,
    "ROOT %r = f32[10,8]{1,0} fusion(%a, %u, %j), kind=kLoop, calls=%both": 2 * ALL + ROW + 4,
    "ROOT %r = f32[10,8]{1,0} dynamic-update-slice(%a, %u, %j, %j)": 2 * ROW + 2 * 4,
    "ROOT %w = s32[] while(%j), condition=%again, body=%step": 6 * (128 + 8 + 9),
    "ROOT %w = s32[] conditional(%j, %j, %j), branch_computations={%step, %less}": 128 + 8,
    "ROOT %w = s32[] call(%j), to_apply=%step": 128 + 8,
    "ROOT %s = ((s32[4]{0}), s32[2]{0:S(1)}, s32[]{:S(2)}) slice-start(%i), slice={[0:2]}": 8,
    "ROOT %s = (s32[4]{0:S(1)}, s32[4]{0}, u32[]{:S(2)}) copy-start(%i)": 16,
    # Three rows and five columns fill a tile of 8 by 128.
    "ROOT %s = f32[3,5]{1,0:T(8,128)} broadcast(%p), dimensions={}": 4 * 8 * 128,
    "ROOT %s = f32[3,5]{0,1:T(8,128)} broadcast(%p), dimensions={}": 4 * 8 * 128,
    "ROOT %s = f32[9,5]{0,1:T(8,128)} broadcast(%p), dimensions={}": 4 * 128 * 8,
}


@pytest.mark.parametrize("line", MOVES)
def test_memory_traffic_of_each_instruction(line):
    arrays = (
        "%a = f32[10,8]{1,0} parameter(2)\n  %u = f32[1,8]{1,0} parameter(3)\n"
        "  %j = s32[] parameter(4)\n  "
    )
    assert hbm_bytes(write(arrays + line, FUSED)) == MOVES[line]
