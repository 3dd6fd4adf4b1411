"""Writes the small files that tests/hub/test_golden.py compares with: one tiny model a family.

    bash launch/test.sh --make_golden [NAME ...]

Run it when a family is added; a file that is there is only replaced where it is named.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import real  # noqa: E402
import reference  # noqa: E402
from cases import all_cases  # noqa: E402

GOLDEN = HERE.parent / "hub" / "golden"


def make(case) -> None:
    """One folder: config.json, model.safetensors, expected.npz."""
    folder = GOLDEN / case.name
    shutil.rmtree(folder, ignore_errors=True)
    model = reference.build(case)
    values = [p for p in model.parameters() if p.requires_grad]  # others are computed
    values += [buffer for _, buffer in reference.floating_buffers(model)]
    with torch.no_grad():
        for value in values:
            value.copy_(value.half().float())  # half the bytes hold it exactly
    kind = reference.kind_of(model)
    batches = reference.batches(case, kind, model.config.vocab_size)
    batch = {name: value[[0, 2]] for name, value in batches["right"].items()}
    arrays = {f"batch/{name}": value for name, value in batch.items()}
    outputs = without_padding(reference.outputs(model, batch), batch["mask"])
    arrays |= {f"out/{name}": value for name, value in outputs.items()}
    if reference.generates(case.model):
        whole = batch | {"mask": np.ones_like(batch["mask"])}
        arrays["greedy"] = reference.greedy(model, whole)
    reference.save(model.half(), folder)
    np.savez_compressed(folder / "expected.npz", **arrays)


def without_padding(outputs: dict, mask: np.ndarray) -> dict:
    """Zeros, which compress, where nothing is compared."""
    result = {}
    for name, value in outputs.items():
        layers = value if name.endswith("layers") else value[None]
        if layers.shape[1:3] == mask.shape:
            layers = np.where(mask.reshape(mask.shape + (1,) * (layers.ndim - 3)), layers, 0)
        result[name] = layers.reshape(value.shape)
    return result


def main() -> None:
    """Those named, or those that are missing."""
    names = sys.argv[1:]
    for case in all_cases():
        wanted = case.name in names if names else not (GOLDEN / case.name).exists()
        if case.golden and wanted:
            make(case)
            print(case.name)
    minilm = GOLDEN / "minilm.npz"  # of real weights, which a package brings
    if minilm.stem in names or not (names or minilm.exists()):
        np.savez_compressed(minilm, **real.embeddings(real.SENTENCES))
        print(minilm.stem)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (GOLDEN / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
