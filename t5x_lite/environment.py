"""Defaults for what JAX and its compilers read from the environment, before JAX is imported.

A variable that is set already is left alone; `arguments.ENVIRONMENT_HELP` documents them.
"""

import contextlib
import os
import re
from collections.abc import MutableMapping
from pathlib import Path

GOOGLE = "0x1ae0"  # the PCI vendor of TPU chips


def set_defaults(
    environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/sys/bus/pci/devices")
) -> None:
    """Sets what is missing.

    Args:
      environment: variables, changed in place.
      devices: folder of this machine's PCI devices.
    """
    defaults = {}
    home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(home, "t5x_lite", "xla")
    # Without a writable home (a container) programs are compiled anew; nothing else changes.
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        defaults["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    if count := emulated_devices(environment):
        # XLA runs a program's independent collectives at once, a blocked thread each, in a pool
        # of one thread a device: devices that begin with different ones wait for each other
        # forever. NPROC is the size of that pool.
        defaults["NPROC"] = str(8 * count)
    if not has_tpu(devices):
        # Keeps libtpu, where it is installed for its compiler, from asking who it is, and saying
        # that nobody answers.
        defaults |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    for name, value in defaults.items():
        environment.setdefault(name, value)


def emulated_devices(environment: MutableMapping[str, str]) -> int:
    """How many devices XLA is told to make of one CPU; 0 if it isn't told."""
    flags = environment.get("XLA_FLAGS", "")
    found = re.findall(r"xla_force_host_platform_device_count=(\d+)", flags)
    found += re.findall(r"\d+", environment.get("JAX_NUM_CPU_DEVICES", ""))
    return max(map(int, found), default=0)


def has_tpu(devices: Path) -> bool:
    """Whether one of the PCI devices is Google's, as JAX asks too (or a network card of GCE)."""
    with contextlib.suppress(OSError):
        return any(path.read_text().strip() == GOOGLE for path in devices.glob("*/vendor"))
    return False
