"""Peak memory of converting a synthetic checkpoint of several GB, both ways.

    python benchmarks/convert_memory.py [--layers 24] [--folder DIR]

Writes a Llama of random bfloat16 tensors in shards, converts it and exports it again, each in a
process of its own, and prints the peak of resident memory beside the parameters' size.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPE = {"width": 2048, "hidden": 5632, "vocab": 32_000}
SMALL = {"width": 128, "hidden": 128, "vocab": 256}
MEASURED = """
import resource, sys
from t5x_lite import cli
code = cli.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def write(folder: Path, layers: int, width: int, hidden: int, vocab: int) -> int:
    """config.json and one shard a layer, with the index; returns the bytes of all shards."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 16,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))

    def draw(*shape):
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    shards = [{"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width),
               "model.norm.weight": (width,)}]  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"mlp.{name}_proj": (hidden, width) for name in ("gate", "up")}
        shapes |= {"mlp.down_proj": (width, hidden), "input_layernorm": (width,)}
        shapes |= {"post_attention_layernorm": (width,)}
        shards.append({f"{at}.{name}.weight": shape for name, shape in shapes.items()})
    weight_map = {}
    for number, shapes in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        save_file({tensor: draw(*shape) for tensor, shape in shapes.items()}, folder / name)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measured(*arguments: str) -> int:
    """Peak resident bytes of a `t5x_lite` command."""
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)
    print(done.stdout.strip().rsplit("\n", 1)[0])
    return int(done.stdout.split()[-1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    gib = 2**30
    try:
        write(folder / "small", 1, **SMALL)
        base = measured("convert", "from-hf", str(folder / "small"), str(folder / "small_run"))
        params = 2 * write(folder / "source", options.layers, **SHAPE)
        peaks = {
            "from-hf": measured("convert", "from-hf", str(folder / "source"), str(folder / "run")),
            "to-hf": measured("convert", "to-hf", str(folder / "run"), str(folder / "out")),
        }
        largest = 4 * options.layers * SHAPE["width"] * SHAPE["hidden"]
        print(
            f"parameters in float32: {params / gib:.2f} GiB, the largest {largest / gib:.2f} GiB; "
            f"a process that converts a tiny model: {base / gib:.2f} GiB"
        )
        for name, peak in peaks.items():
            more = (peak - params - base) / gib
            print(f"{name}: peak {peak / gib:.2f} GiB, {more:+.2f} GiB beside the two together")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
