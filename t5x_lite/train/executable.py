"""Compiled programs in files: written by `compile --save`, run by `train --executable`.

A file holds a fingerprint of what was compiled, for which devices and by what, as a line of JSON,
and then what JAX serialises. That part is machine code inside a pickle: to load it is to run it. So
a file is loaded where a user names it, and never looked for. Its digest shows damage, not malice.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from t5x_lite.distributed import gist
from t5x_lite.errors import UserError
from t5x_lite.train.identity import differences, shown
from t5x_lite.train.program import Program

MAGIC = b"t5x_lite executable, format 1\n"
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # what the compilers read besides the program


def save(
    file: str | Path, program: Program, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled
) -> int:
    """Writes what `load` reads; gives the bytes written.

    Args:
        file: where to.
        program: what was compiled.
        lowered: `program.lower()`.
        compiled: `lowered.compile()`, for devices of this machine or for ones that aren't there;
            not out of the compilation cache: a CPU's program then lacks functions, and says so when
            it is run (JAX 0.10.2).

    Raises:
        UserError: a program that JAX can't serialise, such as one that calls back into Python, or a
            file that can't be written.
    """
    try:
        payload, _, _ = serialize_executable.serialize(compiled)
    except Exception as error:  # JAX raises what its parts happen to
        raise UserError(f"{file}: this program can't be stored ({gist(error)}); leave --save "
                        f"out.") from error  # fmt: skip
    header = {
        "fingerprint": fingerprint(program, lowered),
        "digest": hashlib.sha256(payload).hexdigest(),
    }
    content = MAGIC + json.dumps(header).encode() + b"\n" + payload
    path, part = Path(file), Path(f"{file}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {gist(error)}; give another --save.") from error
    return len(content)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds, none of which has been run.

    Attributes:
        file: its path.
        fingerprint: of what was compiled.
        digest: that the payload should have.
        payload: what JAX serialised.
    """

    file: str | Path
    fingerprint: Mapping[str, Any]
    digest: str
    payload: bytes


def read(file: str | Path) -> Stored:
    """Reads a file of `save`.

    Raises:
        UserError: no such file, or none that `save` wrote whole.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"--executable {file}: {error.strerror or error}.") from error
    try:
        if not content.startswith(MAGIC):
            raise ValueError("another beginning")
        line, _, payload = content[len(MAGIC) :].partition(b"\n")
        header = json.loads(line)
        stored = Stored(file, header["fingerprint"], header["digest"], payload)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--executable {file}: no file that `t5x_lite compile --save` of this "
                        f"version wrote.") from error  # fmt: skip
    if hashlib.sha256(payload).hexdigest() != stored.digest:
        raise UserError(f"--executable {file} is damaged (its checksum differs): write it again "
                        f"by `t5x_lite compile --save`.")  # fmt: skip
    return stored


def load(
    stored: Stored, program: Program, lowered: jax.stages.Lowered
) -> tuple[jax.stages.Compiled | None, str]:
    """The executable, and a line that says so; None and why, where it is of another program.

    Args:
        stored: from `read`; code that is run, so it must come from where you would take code from.
        program: what is to be run.
        lowered: `program.lower()`.
    """
    now = fingerprint(program, lowered)
    if changed := differences(stored.fingerprint, now):
        return None, f"{stored.file} is of another program ({_told(changed)}): compiling instead"
    try:
        compiled = serialize_executable.deserialize_and_load(
            stored.payload,
            # Rebuilt, so that the file needs no trees.
            jax.tree.structure((program.inputs, {})),
            lowered.out_tree,
            execution_devices=list(_mesh(program).devices.flat),
        )
    except Exception as error:  # of the compiler's runtime
        return None, f"{stored.file} doesn't load here ({gist(error)}): compiling instead"
    return compiled, f"running {stored.file}, compiled by jax {now['jax']}"


def fingerprint(program: Program, lowered: jax.stages.Lowered) -> dict[str, Any]:
    """What must be the same for an executable to be this program's, as JSON.

    The program's text settles it; the rest says in a user's words what has changed.
    """
    mesh = _mesh(program)
    devices = list(mesh.devices.flat)
    places = [(device.id, *getattr(device, "coords", ())) for device in devices]
    found = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "backend": _backend(devices[0]),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "processes": len({device.process_index for device in devices}),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "order": _digest(json.dumps(places)),
        "flags": {name: sorted(os.environ.get(name, "").split()) for name in FLAGS},
        **program.settings,
        "program": _digest(lowered.as_text()),
    }
    return json.loads(json.dumps(found, default=_name))


def _mesh(program: Program) -> jax.sharding.Mesh:
    return jax.tree.leaves(program.inputs)[0].sharding.mesh


def _backend(device: jax.Device) -> str:
    """The compiler, and on a CPU which instructions it may use."""
    if device.platform != "cpu":
        return " ".join(device.client.platform_version.split())
    return f"{platform.machine()} {_cpu_features()}"


@functools.cache
def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = ("flags", "Features")  # on x86 and on ARM
    found = [line.partition(":")[2].split() for line in lines if line.startswith(names)]
    return _digest(" ".join(sorted({feature for each in found for feature in each})))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name(value: Any) -> str:
    """Of what JSON can't say: schedules are functions, whose numbers are in the program."""
    return getattr(value, "__qualname__", type(value).__name__)


def _told(changed: list[str]) -> str:
    """The differences for a user to read, not those of digests, which follow or stand for one."""
    plain = [line for line in changed if not line.startswith(("program:", "order:"))]
    if plain:
        return shown(plain)
    if any(line.startswith("order:") for line in changed):
        return "its devices are in another order"
    return "its code differs, or a number that no setting shows, such as a schedule's"
