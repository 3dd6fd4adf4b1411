"""One contender of train_step.py or gpu.py: a process, `python contender.py JOB` (JSON).

It builds its model, compiles, warms up and answers with a line of JSON; then it answers each line
that it reads, a number of steps. The same file runs in t5x_lite's environment and in torch's, which
lack each other's packages, so both are imported where they are needed.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from turns import answering

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
RATE, BETAS, EPSILON, DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0  # AdamW
PRODUCT = {"cpu": 2048, "gpu": 8192}  # side of the matrices whose product gives the peak


@dataclass(frozen=True)
class Job:
    """A model's sizes, and how a contender is to compute it."""

    family: str  # gpt, llama, bert or t5
    vocab: int
    width: int
    layers: int  # of each stack
    heads: int
    head_dim: int
    hidden: int
    batch: int
    length: int
    target_length: int = 0  # of t5's decoder
    dropout: float = 0.0
    contender: str = "t5x_lite"  # or eager, compiled; modes may follow, t5x_lite-bf16
    warmup: int = 2
    device: str = "cpu"  # or gpu
    flash: bool = False  # torch: no masks, which keep flash attention away
    remats: tuple[str, ...] = ("none",)  # t5x_lite: the first with which it fits the device

    @property
    def modes(self) -> list[str]:
        return self.contender.split("-")[1:]


class Side(NamedTuple):
    """What a library makes of a job."""

    run: Callable[[int], list[float]]  # so many steps; their losses
    product: Callable[[], None]  # one product of two matrices, waited for
    peak_bytes: Callable[[], int]  # the high-water mark of memory
    parameters: int
    about: dict[str, Any]  # versions
    notes: dict[str, Any]  # what else to answer


def tokens(job: Job) -> dict[str, np.ndarray]:
    """The one batch of all contenders and steps: uniform tokens, each position has a target."""
    rng, outputs = np.random.default_rng(0), job.target_length or job.length
    lengths = {"tokens": outputs, "targets": outputs}
    if job.target_length:
        lengths["encoder_tokens"] = job.length
    return {
        name: rng.integers(2, job.vocab, (job.batch, length), dtype=np.int32)
        for name, length in lengths.items()
    }


def t5x_lite_batch(job: Job) -> dict[str, np.ndarray]:
    """The same tokens as the batches of `t5x_lite train` have them."""
    batch = tokens(job)
    batch["weights"] = np.ones(batch["targets"].shape, np.float32)
    if "segments" in job.modes:
        for name in [name for name in batch if name.endswith("tokens")]:
            ones = np.ones_like(batch[name])
            batch[name.replace("tokens", "segments")] = ones
            batch[name.replace("tokens", "positions")] = np.cumsum(ones, 1, np.int32) - 1
    return batch


def t5x_lite_config(job: Job):
    """The family's preset at the job's size."""
    from t5x_lite.nn.presets import bert, gpt2, llama, t5

    presets = {"gpt": gpt2.gpt2, "llama": llama.llama, "bert": bert.bert, "t5": t5.t5_1_1}
    shape = {"vocab_size": job.vocab, "width": job.width, "layers": job.layers, "heads": job.heads}
    if job.family == "t5":  # the others' are width / heads and, but for Llama's, 4 · width
        shape |= {"head_dim": job.head_dim, "hidden": job.hidden}
    if job.family == "llama":
        shape |= {"kv_heads": job.heads, "hidden": job.hidden}
    dtype = "bfloat16" if "bf16" in job.modes else "float32"
    scan = "unrolled" not in job.modes
    return presets[job.family]("tiny", dropout=job.dropout, dtype=dtype, scan=scan, **shape)


def t5x_lite_step(job: Job, program: Callable):
    """`program` of a policy of rematerialisation, compiled with the first that leaves it room."""
    import jax

    from t5x_lite.aot import chips, figures

    here = jax.devices()[0].memory_stats() or {}  # a CPU says nothing of itself
    limit = here.get("bytes_limit")
    # Not to the last byte: what is freed leaves gaps.
    chip = chips.Chip((), {}, limit and int(0.95 * limit))
    for remat in job.remats:
        began = time.perf_counter()
        step = program(remat).lower().compile()
        seconds = time.perf_counter() - began
        memory = figures.memory(step, chip)
        if memory["capacity"] is None or memory["total"] <= memory["capacity"]:
            break
    fused = "cudnn" if "__cudnn$fmha" in step.as_text() else "none"
    return step, {"remat": remat, "compile_seconds": seconds, "fused_attention": fused}


def t5x_lite(job: Job) -> Side:
    """The very step that `t5x_lite train` runs, on one device."""
    import jax
    import jax.numpy as jnp

    from t5x_lite.losses import CrossEntropy
    from t5x_lite.nn import parameters
    from t5x_lite.nn.config import compiled
    from t5x_lite.optim import AdamW
    from t5x_lite.partitioning import MeshConfig, Sharding
    from t5x_lite.schedules import constant
    from t5x_lite.train.program import train_program
    from t5x_lite.train.state import init_state, state_shardings

    model, sharding = t5x_lite_config(job), Sharding(MeshConfig().build())
    # decay="" matches every parameter, as torch's AdamW decays all that it is given.
    optimizer = AdamW(constant(RATE), *BETAS, EPSILON, DECAY, decay="", clip_norm=CLIP_NORM)
    batch = t5x_lite_batch(job)
    shapes = {name: (x.shape, x.dtype) for name, x in batch.items()}

    def program(remat: str):
        return train_program(
            compiled(model, "auto", remat), optimizer, CrossEntropy(), sharding, shapes
        )

    step, notes = t5x_lite_step(job, program)
    transform = optimizer.build(parameters.abstract(model)[1])
    _, shardings = state_shardings(model, optimizer, sharding)
    state = jax.jit(lambda: init_state(model, transform, 0), out_shardings=shardings)()
    batch = {name: jax.device_put(x, sharding.batch(x.shape, name)) for name, x in batch.items()}
    key = jax.random.key(0)

    def run(steps: int) -> list[float]:
        nonlocal state
        losses = []
        for _ in range(steps):
            state, metrics = step(state, batch, key)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        return [float(loss) for loss in losses]

    def peak() -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    matrix, matmul = jnp.ones(2 * (PRODUCT[job.device],), model.dtype), jax.jit(jnp.matmul)
    product = lambda: matmul(matrix, matrix).block_until_ready()  # noqa: E731
    peak = peak_bytes if job.device == "cpu" else peak
    return Side(run, product, peak, parameters.count(model), {"jax": jax.__version__}, notes)


def torch_model(job: Job):
    """The same model of `transformers`."""
    import torch
    import transformers as hf

    ids = {"vocab_size": job.vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if job.family == "gpt":
        sizes = {"n_embd": job.width, "n_layer": job.layers, "n_head": job.heads}
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), job.dropout)
        config = hf.GPT2Config(n_inner=job.hidden, **ids, **sizes, **rates)
        return hf.GPT2LMHeadModel(config)
    if job.family == "llama":
        sizes = {"hidden_size": job.width, "num_hidden_layers": job.layers}
        sizes |= {"num_attention_heads": job.heads, "num_key_value_heads": job.heads}
        sizes |= {"intermediate_size": job.hidden, "rms_norm_eps": 1e-5}
        sizes |= {"max_position_embeddings": job.length}
        config = hf.LlamaConfig(**ids, **sizes, tie_word_embeddings=False)
        return hf.LlamaForCausalLM(config)
    if job.family == "bert":
        sizes = {"hidden_size": job.width, "num_hidden_layers": job.layers}
        sizes |= {"num_attention_heads": job.heads, "intermediate_size": job.hidden}
        rates = {f"{name}_dropout_prob": job.dropout for name in ("hidden", "attention_probs")}
        return hf.BertForMaskedLM(hf.BertConfig(**ids, **sizes, **rates))
    sizes = {"d_model": job.width, "d_kv": job.head_dim, "d_ff": job.hidden}
    sizes |= {"num_layers": job.layers, "num_heads": job.heads, "dropout_rate": job.dropout}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**ids, **sizes, **kind))
    # transformers 5 ties a new model's head whatever the config says, and T5 1.1 has its own.
    head = torch.empty(job.vocab, job.width).normal_(std=job.width**-0.5)
    model.lm_head.weight = torch.nn.Parameter(head)
    return model


def unmasked(model, family: str) -> None:
    """Flash attention and nothing else; where it can't do the work (T5's bias), what can.

    transformers leaves a causal mask to `is_causal`, as flash attention needs it, but not under
    `torch.compile` of torch before 2.14 (masking_utils.py, `_ignore_causal_mask_sdpa`).
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("unmasked", sdpa_attention_forward)
    AttentionMaskInterface.register("unmasked", lambda *_, **__: None)
    model.set_attn_implementation("unmasked")
    if family != "t5":
        for other in ("math", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{other}_sdp")(False)


def torch_side(job: Job) -> Side:
    """The usual loop: zero, forward, backward, clip, a fused AdamW."""
    import torch
    import transformers

    torch.manual_seed(0)
    where = {"cpu": "cpu", "gpu": "cuda"}[job.device]
    with torch.device(where):
        model = torch_model(job).train()
    if job.flash:
        unmasked(model, job.family)
    adam = {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": DECAY}
    optimizer = torch.optim.AdamW(model.parameters(), **adam, fused=True)
    batch = {name: torch.from_numpy(x).long().to(where) for name, x in tokens(job).items()}
    inputs = {"input_ids": batch["tokens"]}
    if job.family == "t5":
        inputs = {"input_ids": batch["encoder_tokens"], "decoder_input_ids": batch["tokens"]}
    if job.family != "bert":
        inputs["use_cache"] = False

    def objective():
        with torch.autocast(where, torch.bfloat16, enabled="bf16" in job.modes):
            logits = model(**inputs).logits
        # Not the model's own loss, which shifts GPT-2's targets and so drops one in each row.
        logits, targets = logits.float().flatten(0, 1), batch["targets"].flatten()
        return torch.nn.functional.cross_entropy(logits, targets)

    if job.contender.startswith("compiled"):
        objective = torch.compile(objective)

    def run(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = objective()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            losses.append(loss.detach())
        wait()
        return [loss.item() for loss in losses]  # read at the end, so that no step waits for it

    dtype = torch.bfloat16 if "bf16" in job.modes else torch.float32
    matrix = torch.ones(2 * (PRODUCT[job.device],), dtype=dtype, device=where)
    wait = torch.cuda.synchronize if where == "cuda" else lambda: None

    def product() -> None:
        matrix @ matrix
        wait()

    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    about["threads"] = torch.get_num_threads()
    count = sum(parameter.numel() for parameter in model.parameters())
    peak = torch.cuda.max_memory_allocated if where == "cuda" else peak_bytes
    return Side(run, product, peak, count, about, {})


def matmul_rate(product: Callable[[], None], size: int) -> float:
    """FLOP/s of the best of a few products."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_bytes() -> int:
    """The high-water mark of this process's memory since `main` reset it."""
    with contextlib.suppress(OSError):
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, of the whole life


def main() -> None:
    job, began = Job(**json.loads(sys.argv[1])), time.perf_counter()
    answer = answering()
    side = (t5x_lite if job.contender.startswith("t5x_lite") else torch_side)(job)

    start = time.perf_counter()
    losses = side.run(1)
    warm = time.perf_counter()
    losses += side.run(job.warmup - 1)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # compiling isn't in the peak
    # torch compiles in its first step, which is that much longer than the next ones.
    again = (time.perf_counter() - warm) / max(job.warmup - 1, 1)
    first = {"first_step_seconds": warm - began, "compile_seconds": warm - start - again}
    facts = {"parameters": side.parameters, "about": side.about}
    answer(losses=losses, **facts, **{**first, **side.notes})
    for line in sys.stdin:
        start = time.perf_counter()
        losses = side.run(int(line))
        seconds = (time.perf_counter() - start) / len(losses)
        peak, rate = side.peak_bytes(), matmul_rate(side.product, PRODUCT[job.device])
        answer(losses=losses, step_seconds=seconds, matmul_rate=rate, peak_bytes=peak)


if __name__ == "__main__":
    main()
