"""Imports point downwards only, and optional packages are imported where they are needed."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "t5x_lite"

# Each part of the package, lowest first, and the parts that it may import. Everything may import
# the foundation, and each part itself.
FOUNDATION = {"t5x_lite", "errors", "types"}
MODEL = {"nn", "partitioning"}
PURE = {"cross_entropy", "losses", "router_losses", "optim", "schedules", "flops", "tensors"}
TABLE = {
    "t5x_lite": set(),
    "errors": set(),
    "types": set(),
    "metrics": set(),
    "tensors": set(),
    "folders": {"tensors"},
    "partitioning": set(),
    "schedules": set(),
    "data": {"metrics"},
    "nn": {"partitioning"},
    "flops": MODEL,
    "cross_entropy": MODEL,
    "losses": MODEL | {"cross_entropy"},
    "router_losses": MODEL | {"losses"},
    "optim": MODEL | {"schedules", "tensors"},
    "rollcall": set(),
    "distributed": {"rollcall"},
    "checkpoint": {"partitioning", "tensors", "folders", "distributed"},
    "train": MODEL | PURE | {"data", "metrics", "checkpoint", "distributed"},
    "decode": MODEL | {"losses"},
    "evaluate": MODEL | PURE | {"data", "metrics", "checkpoint", "decode", "train", "distributed"},
    "serve": MODEL | {"data", "checkpoint", "decode", "train"},
    "hub": MODEL | {"data", "checkpoint", "train"},
    "environment": set(),
    "aot": MODEL | PURE | {"data", "decode", "train"},
    # laws and fits are NumPy alone; what designs and runs sweeps knows models
    "scaling": MODEL | PURE | {"data", "metrics", "train", "environment", "aot"},
    "arguments": set(),
    "cli": {
        *("arguments", "environment", "distributed", "data", "train", "evaluate", "serve"),
        *("hub", "scaling", "aot"),
    },
    "__main__": {"cli"},
}
# Parts of the table's rows that may see one file or two of another part only.
NARROW = {
    ("serve", "data"): {"data.vocabularies", "data.byt5_vocabulary", "data.tasks"},
    ("serve", "train"): {"train.restore"},
    ("hub", "data"): {
        *("data.vocabularies", "data.imported", "data.json_vocabulary", "data.byt5_vocabulary"),
        "data.tasks",
    },
    ("hub", "train"): {"train.restore", "train.identity"},
}
# Files that see nothing of ours but the foundation, and so may be seen from everywhere.
LEAVES = {"aot.chips", "aot.count", "aot.hlo"}
# No JAX at all where only NumPy is wanted, and gin at the edge.
FORBIDDEN = {
    "metrics": {"jax", "flax", "optax", "orbax"},
    "data": {"jax", "flax", "optax", "orbax", "tensorflow"},
    "arguments": {"jax", "numpy", "gin"},
}
CORE = {
    *("jax", "jaxlib", "flax", "optax", "orbax", "gin", "grain", "array_record", "numpy", "rich"),
    *("tensorflow_datasets", "sentencepiece", "jaxtyping"),
    *("absl", "etils", "tensorstore", "ml_dtypes"),  # required by jax, flax and orbax themselves
}


def part_of(module):
    """`t5x_lite.data.tasks` belongs to `data`."""
    return module.split(".")[1] if "." in module else module


def imports(path):
    """(module, whether outside of functions) of every import in a file."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        top = node not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from t5x_lite.data import tasks` may name a module or something in one
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def problems(path):
    own = part_of(module_of(path))
    if own not in TABLE:
        yield f"{own} is not in the table: say what it may import"
        return
    for name, top in imports(path):
        root = name.split(".")[0]
        if root == "t5x_lite":
            yield from internal(own, name)
        elif root == "gin" and own != "cli":
            yield "gin: only cli.py knows it"
        elif root in FORBIDDEN.get(own, ()):
            yield f"{root} has no place here"
        elif top and root not in CORE | sys.stdlib_module_names:
            yield f"{root} at the top: import it in the function that needs it"


def internal(own, name):
    other = part_of(name)
    if ".".join(name.split(".")[1:3]) in LEAVES:
        return
    if other in TABLE[own] | FOUNDATION | {own} or other == "__version__":
        allowed = NARROW.get((own, other))
        module = name.removeprefix("t5x_lite.")
        if allowed is None or any(f"{module}.".startswith(f"{one}.") for one in allowed):
            return
    yield f"{name}: {own} may not import it"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path):
    assert list(problems(path)) == []


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_see_the_foundation_alone(leaf):
    path = PACKAGE / f"{leaf.replace('.', '/')}.py"
    own = {part_of(name) for name, _ in imports(path) if name.startswith("t5x_lite")}
    assert own <= FOUNDATION


def test_the_table_has_no_circle():
    order = list(TABLE)
    for part, below in TABLE.items():
        assert all(order.index(other) < order.index(part) for other in below), part


def test_every_part_of_the_table_exists():
    parts = {part_of(module_of(path)) for path in FILES}
    assert set(TABLE) - parts == set()


LAWS = ("fit", "laws", "minimise", "isoflop", "projection", "points")


@pytest.mark.parametrize("name", LAWS)
def test_fits_can_be_used_alone(name):
    roots = {found.split(".")[0] for found, _ in imports(PACKAGE / "scaling" / f"{name}.py")}
    assert roots <= {"numpy", "scipy", "t5x_lite", *sys.stdlib_module_names}
    own = {f for f, _ in imports(PACKAGE / "scaling" / f"{name}.py") if f.startswith("t5x_lite")}
    assert {part_of(module) for module in own} <= {"scaling", "errors"}


def test_no_file_is_a_drawer_for_everything():
    assert {path.stem for path in FILES} & {"utils", "util", "misc", "common", "helpers"} == set()


def test_the_wheel_holds_every_folder_with_code():
    listed = (
        (PACKAGE.parent / "setup.cfg").read_text().split("packages =\n")[1].split("package_dir")[0]
    )
    folders = {module_of(path.parent / "__init__.py") for path in FILES}
    assert set(listed.split()) == folders | {"t5x_lite.gin_configs"}
