"""One contender of train_step.py, in a process of its own: `python contender.py JOB` (JSON).

It builds its model, compiles, warms up and answers with a line of JSON; then it answers each line
that it reads, a number of steps. The same file runs in t5x_lite's environment and in torch's, which
lack each other's packages, so both are imported where they are needed.
"""

import contextlib
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from turns import answering

RATE, BETAS, EPSILON, DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0  # AdamW
PRODUCT = 2048  # side of the matrices whose product gives the peak


@dataclass(frozen=True)
class Job:
    """A model's sizes, and how a contender is to compute it."""

    family: str  # gpt, bert or t5
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
    contender: str = "t5x_lite"  # or eager, compiled; a mode may follow, t5x_lite-bf16
    warmup: int = 2

    @property
    def mode(self) -> str:
        return self.contender.partition("-")[2]


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


def t5x_lite_config(job: Job):
    """The family's preset at the job's size."""
    from t5x_lite.nn.presets import bert, gpt2, t5

    preset = {"gpt": gpt2.gpt2, "bert": bert.bert, "t5": t5.t5_1_1}[job.family]
    shape = {"vocab_size": job.vocab, "width": job.width, "layers": job.layers, "heads": job.heads}
    if job.family == "t5":  # the others' are width / heads and 4 · width
        shape |= {"head_dim": job.head_dim, "hidden": job.hidden}
    dtype = "bfloat16" if job.mode == "bf16" else "float32"
    scan = job.mode != "unrolled"
    return preset("tiny", dropout=job.dropout, dtype=dtype, scan=scan, **shape)


def t5x_lite(job: Job):
    """The very step that `t5x_lite train` runs, on one device."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
    import jax
    import jax.numpy as jnp

    from t5x_lite.losses import CrossEntropy
    from t5x_lite.nn import parameters
    from t5x_lite.optim import AdamW
    from t5x_lite.partitioning import MeshConfig, Sharding
    from t5x_lite.schedules import constant
    from t5x_lite.train.state import init_state, state_shardings
    from t5x_lite.train.step import make_train_step, model_apply

    model, sharding = t5x_lite_config(job), Sharding(MeshConfig().build())
    # decay="" matches every parameter, as torch's AdamW decays all that it is given.
    optimizer = AdamW(constant(RATE), *BETAS, EPSILON, DECAY, decay="", clip_norm=CLIP_NORM)
    transform = optimizer.build(parameters.abstract(model)[1])
    _, shardings = state_shardings(model, optimizer, sharding)
    state = jax.jit(lambda: init_state(model, transform, 0), out_shardings=shardings)()
    apply, schedule = model_apply(model, sharding), optimizer.schedule
    step = make_train_step(apply, CrossEntropy(), transform, schedule, sharding=sharding)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    batch = tokens(job)
    batch["weights"] = np.ones(batch["targets"].shape, np.float32)
    if job.mode == "segments":
        for name in [name for name in batch if name.endswith("tokens")]:
            ones = np.ones_like(batch[name])
            batch[name.replace("tokens", "segments")] = ones
            batch[name.replace("tokens", "positions")] = np.cumsum(ones, 1, np.int32) - 1
    batch = {name: jax.device_put(x, sharding.batch(x.shape)) for name, x in batch.items()}
    key = jax.random.key(0)

    def run(steps: int) -> list[float]:
        nonlocal state
        losses = []
        for _ in range(steps):
            state, metrics = step(state, batch, key)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        return [float(loss) for loss in losses]

    matrix, matmul = jnp.ones((PRODUCT, PRODUCT), model.dtype), jax.jit(jnp.matmul)
    product = lambda: matmul(matrix, matrix).block_until_ready()  # noqa: E731
    return run, product, parameters.count(model), {"jax": jax.__version__}


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


def torch_side(job: Job):
    """The usual loop: zero, forward, backward, clip, a fused AdamW."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = torch_model(job).train()
    adam = {"lr": RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": DECAY}
    optimizer = torch.optim.AdamW(model.parameters(), **adam, fused=True)
    batch = {name: torch.from_numpy(x).long() for name, x in tokens(job).items()}
    inputs = {"input_ids": batch["tokens"]}
    if job.family == "t5":
        inputs = {"input_ids": batch["encoder_tokens"], "decoder_input_ids": batch["tokens"]}
    if job.family != "bert":
        inputs["use_cache"] = False

    def objective():
        with torch.autocast("cpu", torch.bfloat16, enabled=job.mode == "bf16"):
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
            losses.append(loss.item())
        return losses

    dtype = torch.bfloat16 if job.mode == "bf16" else torch.float32
    matrix = torch.ones((PRODUCT, PRODUCT), dtype=dtype)
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    about["threads"] = torch.get_num_threads()
    count = sum(parameter.numel() for parameter in model.parameters())
    return run, lambda: matrix @ matrix, count, about


def matmul_rate(product) -> float:
    """FLOP/s of the best of a few products."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * PRODUCT**3 / min(seconds)


def peak_bytes() -> int:
    """The high-water mark of this process's memory since `main` reset it."""
    with contextlib.suppress(OSError):
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, of the whole life


def main() -> None:
    job, began = Job(**json.loads(sys.argv[1])), time.perf_counter()
    answer = answering()
    side = t5x_lite if job.contender.startswith("t5x_lite") else torch_side
    run, product, parameters, about = side(job)

    losses = run(1)
    first = time.perf_counter() - began
    losses += run(job.warmup - 1)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # compiling isn't in the peak
    answer(losses=losses, parameters=parameters, first_step_seconds=first, about=about)
    for line in sys.stdin:
        start = time.perf_counter()
        losses = run(int(line))
        seconds = (time.perf_counter() - start) / len(losses)
        peak, rate = peak_bytes(), matmul_rate(product)
        answer(losses=losses, step_seconds=seconds, matmul_rate=rate, peak_bytes=peak)


if __name__ == "__main__":
    main()
