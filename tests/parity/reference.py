"""The reference: seeded models of `transformers`, and what they compute."""

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from cases import Case

GENERATED = 64
MASK_ID, PAD_ID = 3, 0
# Classes with two heads name what each gives; ours are the names on the right.
OF_PRETRAINING = {
    "prediction_logits": "logits",
    "seq_relationship_logits": "pair_logits",
    "sop_logits": "pair_logits",
}


def build(case: Case, seed: int = 0):
    """A model with values that hide no mistake: no zero bias, no scale of one."""
    cls = getattr(transformers, case.model)
    config = cls.config_class(**case.config)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *floating_buffers(model)]:
            noise = torch.randn(value.shape)
            if isinstance(value, torch.nn.Parameter) and not value.requires_grad:
                continue  # computed: sinusoidal positions
            if value.ndim == 1 or "bias" in name.rsplit(".", 1)[-1]:
                value.add_(0.2 * noise)
            elif "embedding_" in name:  # a map of embeddings
                value.copy_(noise / value.shape[-1] ** 0.5)
            elif "embed" in name or "shared.weight" in name or "wte" in name or "wpe" in name:
                value.copy_(0.7 * noise)
            else:
                value.copy_(noise / value.shape[-1] ** 0.5)
    return model


def floating_buffers(model):
    """Persistent buffers that take part in the computation."""
    state = model.state_dict()
    return [(n, b) for n, b in model.named_buffers() if n in state and torch.is_floating_point(b)]


def batches(case: Case, kind: str, vocab: int, seed: int = 1) -> dict[str, dict[str, np.ndarray]]:
    """Rows of one length; rows padded on the right; for decoders, rows padded on the left."""
    rng = np.random.default_rng(seed)
    length = case.length
    shape = (3, length)
    lengths = np.array([length, length - 4, 5])[:, None]
    slots = np.arange(length)[None]
    right, left = slots < lengths, slots >= length - lengths
    whole = np.ones(shape, bool)
    masks = {"whole": whole, "right": right} | ({"left": left} if kind == "decoder-only" else {})
    result = {}
    for name, mask in masks.items():
        batch = {"tokens": rng.integers(5, vocab, shape), "mask": mask}
        # Some heads of `transformers` find padding by its token, so that it must be that one.
        pad = case.config.get("pad_token_id")
        if pad is not None:
            batch["tokens"] = np.where(mask, batch["tokens"], pad)
        if kind == "encoder-decoder":
            targets = (3, length - 3)
            batch["decoder_tokens"] = rng.integers(5, vocab, targets)
            batch["decoder_mask"] = np.ones(targets, bool)
        result[name] = {key: np.asarray(value) for key, value in batch.items()}
    return result


def kind_of(model) -> str:
    """encoder-only, decoder-only or encoder-decoder."""
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    # `score` is what a decoder's classifier is called, and no encoder's.
    causal = generates(type(model).__name__) or hasattr(model, "score")
    return "decoder-only" if causal else "encoder-only"


def generates(name: str) -> bool:
    """Whether a class of this name has a head that predicts the next token."""
    heads = ("ForCausalLM", "LMHead", "ForConditionalGeneration", "MTModel")
    return any(part in name for part in heads)


def inputs_of(batch: dict[str, np.ndarray], kind: str) -> dict[str, torch.Tensor]:
    """What the model's forward takes."""
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].astype(np.int64)}
    if kind == "decoder-only":
        positions = np.maximum(np.cumsum(batch["mask"], axis=1) - 1, 0)
        inputs["position_ids"] = positions
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = batch["decoder_tokens"]
        inputs["decoder_attention_mask"] = batch["decoder_mask"].astype(np.int64)
    return {name: torch.tensor(value) for name, value in inputs.items()}


def outputs(model, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Logits (or what the head gives) and every layer's output but the last one's."""
    if getattr(model.config, "trigram_input", False) and not batch["mask"].all():
        return _row_by_row(model, batch)
    kind = kind_of(model)
    with torch.no_grad():
        out = model(**inputs_of(batch, kind), output_hidden_states=True)
    result = {}
    for name in ("logits", "start_logits", "end_logits", "pooler_output", *OF_PRETRAINING):
        if out.get(name) is not None:
            result[OF_PRETRAINING.get(name, name)] = out[name].numpy()
    if not result:
        result["last_hidden_state"] = out.last_hidden_state.numpy()
    names = {"hidden_states": "layers"}
    if kind == "encoder-decoder":
        names = {"encoder_hidden_states": "encoder_layers", "decoder_hidden_states": "layers"}
    for theirs, ours in names.items():
        # The first is the embedding; the last has the stack's final norm.
        layers = [layer.numpy() for layer in out[theirs][1:-1]]
        if layers:
            result[ours] = np.stack(layers)
    return result


def _row_by_row(model, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Each row without its padding, which MobileBERT's embedding reads beside its last token."""
    rows = []
    for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
        row = outputs(model, {"tokens": tokens[mask][None], "mask": mask[mask][None]})
        missing = int((~mask).sum())
        for name, value in row.items():
            if name != "pooler_output":
                widths = [(0, 0)] * value.ndim
                widths[-2] = (0, missing)
                row[name] = np.pad(value, widths)
        rows.append(row)
    axis = {"layers": 1}
    return {n: np.concatenate([row[n] for row in rows], axis.get(n, 0)) for n in rows[0]}


def greedy(model, batch: dict[str, np.ndarray], count: int = GENERATED) -> np.ndarray:
    """Greedy continuations of rows without padding, by the cache of `transformers`."""
    kind = kind_of(model)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1,
        pad_token_id=PAD_ID, eos_token_id=None, bos_token_id=None,
        decoder_start_token_id=PAD_ID if kind == "encoder-decoder" else None,
    )  # fmt: skip
    with torch.no_grad():
        out = model.generate(
            torch.tensor(batch["tokens"]), attention_mask=torch.tensor(batch["mask"]).long()
        )
    return out[:, -count:].numpy()


def gradients(model, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the mean negative log-likelihood of each row's own tokens, by the tensors' names."""
    kind = kind_of(model)
    model.zero_grad()
    logits = model(**inputs_of(batch, kind)).logits
    tokens = torch.tensor(batch["decoder_tokens" if kind == "encoder-decoder" else "tokens"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


def save(model, folder: pathlib.Path) -> None:
    """As `transformers` publishes it."""
    model.save_pretrained(folder)
    # Notes of the library, none of the model.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
