"""Llama 2 and 3 in Hugging Face's form."""

from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.heads import SCORE
from t5x_lite.hub.rope import read_rotary, write_rotary
from t5x_lite.hub.rules import Linear, Rule
from t5x_lite.nn.config import ModelConfig
from t5x_lite.nn.heads import LMHead
from t5x_lite.nn.presets.llama import llama

DROPOUT = "dropout, which a run chooses"


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    width, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    return llama(
        "7b",
        width=width,
        layers=fields.take("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", heads),
        head_dim=fields.take("head_dim", width // heads),
        hidden=fields.take("intermediate_size"),
        positions=read_rotary(fields, 10_000.0),
        epsilon=fields.take("rms_norm_eps", 1e-6),
        tied=fields.take("tie_word_embeddings", False),
        vocab_size=fields.take("vocab_size"),
    )


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    block = model.decoder.blocks[0]
    attention = block.attention
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": model.width,
        "num_hidden_layers": model.decoder.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.keys,
        "head_dim": attention.head_dim,
        "intermediate_size": block.ffn.hidden,
        "rms_norm_eps": block.residual.norm.epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": model.head.tied,
        "vocab_size": model.vocab_size,
        **write_rotary(model.decoder.positions),
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As Llama's own names say."""
    ours, theirs = "decoder/*", "model.layers.{layer}"
    return [
        Rule("embedder/embedding", "model.embed_tokens.weight"),
        *attention_rules(f"{ours}/attention", f"{theirs}.self_attn"),
        Rule(f"{ours}/ffn/gate/kernel", f"{theirs}.mlp.gate_proj.weight", Linear()),
        Rule(f"{ours}/ffn/up/kernel", f"{theirs}.mlp.up_proj.weight", Linear()),
        Rule(f"{ours}/ffn/down/kernel", f"{theirs}.mlp.down_proj.weight", Linear()),
        Rule(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        Rule(f"{ours}/ffn_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        Rule("decoder/final_norm/scale", "model.norm.weight"),
        Rule("head/kernel", "lm_head.weight"),
    ]


def attention_rules(ours: str, theirs: str) -> list[Rule]:
    """Kernels of an attention whose products are named q_proj, k_proj, v_proj and o_proj."""
    return [
        Rule(f"{ours}/query/kernel", f"{theirs}.q_proj.weight", Linear()),
        Rule(f"{ours}/key/kernel", f"{theirs}.k_proj.weight", Linear()),
        Rule(f"{ours}/value/kernel", f"{theirs}.v_proj.weight", Linear()),
        Rule(f"{ours}/out/kernel", f"{theirs}.o_proj.weight", Linear(2)),
    ]


FAMILIES = {
    "llama": Family(
        read,
        write,
        rules,
        ignored_fields={
            "attention_dropout": DROPOUT,
            "max_position_embeddings": "rotary positions have no end",
        },
        ignored_tensors={r".*\.rotary_emb\.inv_freq": "computed from config.json"},
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        base_prefix="model.",
        heads={"LlamaForSequenceClassification": SCORE},
        base_head=LMHead(tied=False),
    )
}
