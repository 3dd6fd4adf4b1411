"""MaxText's side of maxtext.py: its own `train_compile`, and our model of the program that it gets.

    python maxtext_contender.py '{"topology": "v5e-16", "options": {"model_name": "llama2-7b"}, …}'

Runs in MaxText's environment, where t5x_lite isn't installed: PYTHONPATH has this checkout, and
`python -P` keeps this folder, whose maxtext.py isn't the package, out of the way.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import flax.linen
import jax
import maxtext
from maxtext.trainers.pre_train import train_compile

from t5x_lite.aot import figures, topology
from t5x_lite.partitioning import MeshConfig

PACKAGES = ("maxtext", "jax", "libtpu")
DEFAULTS = {
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "run_name": "compile",
    "compile_topology_num_slices": 1,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    report, target = {}, topology.find(job["topology"])
    theirs = train_compile.jit_and_compile

    def observed(function, inputs, named, mesh, *rest):
        """As theirs, which returns the executable alone; the traced program has the FLOPs."""
        report.update(described(rest[-2]))
        traced = trace(function, inputs, named, mesh, *rest)
        began = time.perf_counter()
        executable = theirs(function, inputs, named, mesh, *rest)
        report["compile_seconds"] = time.perf_counter() - began
        text = executable.as_text()
        if job.get("hlo"):
            Path(job["hlo"]).write_text(text, encoding="utf-8")
        report["hbm"] = figures.memory(executable, target.chip)
        placed = SimpleNamespace(mesh=mesh)
        report.update(
            figures.costs(text, traced.jaxpr, None, MeshConfig(), placed, target, "bfloat16")
        )
        return executable

    train_compile.jit_and_compile = observed
    options = {**DEFAULTS, "compile_topology": job["topology"], **job["options"]}
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train_compile.main(["", str(base), *(f"{name}={value}" for name, value in options.items())])
    report |= {"topology": target.name, "chips": target.chips}
    report["versions"] = {name: metadata.version(name) for name in PACKAGES}
    Path(job["json"]).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def trace(function, inputs, named, mesh, in_shard, out_shard, static, donated, config, _):
    """What `train_compile.jit_and_compile` compiles, as a traced program."""
    # The rules that it is given are a context that can be entered only once.
    rules = flax.linen.logical_axis_rules(config.logical_axis_rules)
    with jax.set_mesh(mesh), mesh, rules:
        step = jax.jit(
            function,
            in_shardings=in_shard,
            out_shardings=out_shard,
            static_argnums=static,
            donate_argnums=donated,
        )
        return step.trace(*inputs, **named)


SETTINGS = (
    *("remat_policy", "attention", "dtype", "weight_dtype", "grad_dtype", "mu_dtype", "opt_type"),
    *("scan_layers", "gradient_clipping_threshold", "num_vocab_tiling", "cast_logits_to_fp32"),
    *("max_target_length", "per_device_batch_size", "packing", "matmul_precision", "sa_block_q"),
)


def described(config) -> dict:
    """What MaxText's config says of what must be alike on both sides."""
    return {"settings": {name: str(getattr(config, name)) for name in SETTINGS}}


if __name__ == "__main__":
    main()
