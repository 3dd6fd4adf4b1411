"""The comparison with MaxText, with reports in place of its program and ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "maxtext.py"
GIB = 2**30


def report(temporaries, step):
    hbm = {"arguments": 4 * GIB, "output": 4 * GIB, "alias": 4 * GIB, "code": 0}
    gather = {"kind": "all-gather", "axis": "fsdp", "network": "ici", "count": 2, "bytes": 3e9}
    return {
        "hbm": {**hbm, "temporaries": temporaries, "total": 4 * GIB + temporaries},
        **{"chips": 16, "flops": 32e12, "matmul_flops": 16e12, "hbm_bytes": 5e9},
        "collectives": [gather | {"awaited_bytes": 1e9}, gather | {"awaited_bytes": 0}],
        "seconds": {"compute": 0.5, "hbm": 0.2, "ici": 0.1},
        **{"step_seconds": step, "bound": "compute"},
        # As many as 16 chips of 197e12 FLOP/s do in half a second.
        "model_flops": 16 * 197e12 / 2,
        "versions": {"maxtext": "0.2.4", "jax": "none", "libtpu": "none"},
    }


def compare(folder, theirs, ours):
    for side, found in (("maxtext", theirs), ("t5x_lite", ours)):
        (folder / f"{side}-v5e-16.json").write_text(json.dumps(found))
    options = ("--only", "v5e-16", "--folder", str(folder), "--maxtext_python", sys.executable)
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_both_programs_stand_in_one_table(tmp_path):
    done = compare(tmp_path, report(2 * GIB, 1.0), report(1 * GIB, 0.8))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "| HBM temporaries, GiB | 2.00 | 1.00 | 0.500 |" in lines
    assert "| HBM total, GiB | 6.00 | 5.00 | 0.833 |" in lines
    assert "| FLOPs a chip, T | 2.00 | 2.00 | 1.000 |" in lines
    assert "| all-gather, GB | 6.00 | 6.00 | 1.000 |" in lines
    assert "| waited for, GB | 1.00 | 1.00 | 1.000 |" in lines
    assert "| modelled step, ms | 1,000.00 | 800.00 | 0.800 |" in lines
    assert "| modelled MFU at best | 50.0% | 62.5% | 1.250 |" in lines
    assert "These are different compilers" in done.stdout


@pytest.mark.parametrize(("ours", "status"), [(2 * GIB, 0), (2 * GIB + 1, 1)])
def test_more_memory_than_maxtext_is_an_error(tmp_path, ours, status):
    assert compare(tmp_path, report(2 * GIB, 1.0), report(ours, 1.0)).returncode == status
