"""GPT-2 in Hugging Face's form."""

from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.heads import SCORE
from t5x_lite.hub.rules import Flat, Product, Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.presets.gpt2 import gpt2


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("activation_function", "gelu_new")
    fields.expect("scale_attn_weights", True)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    width = fields.take("n_embd")
    return gpt2(
        "small",
        width=width,
        layers=fields.take("n_layer"),
        heads=fields.take("n_head"),
        hidden=fields.take("n_inner", 4 * width),
        positions=fields.take("n_positions", 1024),
        epsilon=fields.take("layer_norm_epsilon", 1e-5),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block = model.decoder.blocks[0]
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": model.width,
        "n_layer": model.decoder.layers,
        "n_head": block.attention.heads,
        "n_inner": block.ffn.hidden,
        "n_positions": model.decoder.positions.max_length,
        "layer_norm_epsilon": block.residual.norm.epsilon,
        "vocab_size": model.vocab_size,
        "activation_function": "gelu_new",
    }


def rules(model: ModelConfig) -> list[Rule]:
    """Queries, keys and values are one product; kernels lie as [inputs, outputs]."""
    ours, theirs = "decoder/*", "transformer.h.{layer}"
    parts = [f"{ours}/attention/{name}" for name in ("query", "key", "value")]
    joined = f"{theirs}.attn.c_attn"
    return [
        Rule("embedder/embedding", "transformer.wte.weight"),
        Rule("decoder/positions/embedding", "transformer.wpe.weight"),
        Rule(tuple(f"{part}/kernel" for part in parts), f"{joined}.weight", Product(), axis=1),
        Rule(tuple(f"{part}/bias" for part in parts), f"{joined}.bias", Flat()),
        Rule(f"{ours}/attention/out/kernel", f"{theirs}.attn.c_proj.weight", Product(2)),
        Rule(f"{ours}/attention/out/bias", f"{theirs}.attn.c_proj.bias"),
        Rule(f"{ours}/ffn/up/kernel", f"{theirs}.mlp.c_fc.weight", Product()),
        Rule(f"{ours}/ffn/up/bias", f"{theirs}.mlp.c_fc.bias"),
        Rule(f"{ours}/ffn/down/kernel", f"{theirs}.mlp.c_proj.weight", Product()),
        Rule(f"{ours}/ffn/down/bias", f"{theirs}.mlp.c_proj.bias"),
        Rule(f"{ours}/attention_norm/scale", f"{theirs}.ln_1.weight"),
        Rule(f"{ours}/attention_norm/bias", f"{theirs}.ln_1.bias"),
        Rule(f"{ours}/ffn_norm/scale", f"{theirs}.ln_2.weight"),
        Rule(f"{ours}/ffn_norm/bias", f"{theirs}.ln_2.bias"),
        Rule("decoder/final_norm/scale", "transformer.ln_f.weight"),
        Rule("decoder/final_norm/bias", "transformer.ln_f.bias"),
    ]


FAMILIES = {
    "gpt2": Family(
        read,
        write,
        rules,
        ignored_fields={
            "attn_pdrop": "dropout, which a run chooses",
            "embd_pdrop": "dropout, which a run chooses",
            "resid_pdrop": "dropout, which a run chooses",
            "n_ctx": "as n_positions",
            "reorder_and_upcast_attn": "softmax is always float32",
            "summary_activation": "of a head for multiple choice",
            "summary_first_dropout": "of a head for multiple choice",
            "summary_proj_to_labels": "of a head for multiple choice",
            "summary_type": "of a head for multiple choice",
            "summary_use_proj": "of a head for multiple choice",
            "tie_word_embeddings": "always tied",
        },
        ignored_tensors={
            r".*\.attn\.(masked_)?bias": "the causal mask, as older versions stored it",
        },
        tied={"lm_head.weight": "transformer.wte.weight"},
        base_prefix="transformer.",
        heads={"GPT2ForSequenceClassification": SCORE},
        base_head=LMHead(tied=True),
    )
}
