"""BART in Hugging Face's form; Marian has the same names."""

from collections.abc import Iterator

from t5x_lite.errors import UserError
from t5x_lite.hub.families import Family
from t5x_lite.hub.fields import Fields
from t5x_lite.hub.rules import Product, Rule, linear_rules, norm_rules
from t5x_lite.nn.config import ModelConfig, StackConfig
from t5x_lite.nn.heads import FixedBiasLMHead, LMHead
from t5x_lite.nn.presets.bart import bart

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu", "silu": "silu"}
# The bare model has no bias; `transformers` adds zeros when it predicts by one.
HEADS = {
    "BartForConditionalGeneration": FixedBiasLMHead(tied=True),
    "BartModel": LMHead(tied=True),
}
# What fairseq's options were; each changes the model where it has another value.
FAIRSEQ = {
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "normalize_before": False,
}


def read(fields: Fields) -> ModelConfig:
    """The model of a config.json."""
    fields.expect("normalize_embedding", True)
    fields.expect("static_position_embeddings", False)
    fields.expect("extra_pos_embeddings", 2)
    architecture = fields.architecture or "BartForConditionalGeneration"
    if architecture not in HEADS:
        raise UserError(f"architecture {architecture} is unknown; there are {', '.join(HEADS)}.")
    return bart(
        "base",
        **read_shape(fields),
        positions=fields.take("max_position_embeddings", 1024),
        head=HEADS[architecture],
    )


def read_shape(fields: Fields, activation: str = "gelu") -> dict:
    """What the config.json of BART and Marian have in common, under our names."""
    for name, value in FAIRSEQ.items():
        fields.expect(name, value)
    fields.expect("is_decoder", False)
    fields.expect("add_cross_attention", False)
    fields.expect("tie_word_embeddings", True)
    layers, name = fields.take("encoder_layers", 12), fields.take("activation_function", activation)
    fields.expect("num_hidden_layers", layers)
    if name not in ACTIVATIONS:
        raise UserError(f"activation_function {name!r} is unknown; there are "
                        f"{', '.join(ACTIVATIONS)}.")  # fmt: skip
    return {
        "width": fields.take("d_model"),
        "layers": layers,
        "decoder_layers": fields.take("decoder_layers", 12),
        "heads": fields.take("encoder_attention_heads", 16),
        "decoder_heads": fields.take("decoder_attention_heads", 16),
        "hidden": fields.take("encoder_ffn_dim", 4096),
        "decoder_hidden": fields.take("decoder_ffn_dim", 4096),
        "activation": ACTIVATIONS[name],
        "scaled": fields.take("scale_embedding", False),
        "vocab_size": fields.take("vocab_size"),
    }


def write(model: ModelConfig) -> dict:
    """The config.json of a model."""
    architecture = next(name for name, head in HEADS.items() if head == model.head)
    return {
        "model_type": "bart",
        "architectures": [architecture],
        **write_shape(model),
        "max_position_embeddings": model.decoder.positions.max_length,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }


def write_shape(model: ModelConfig) -> dict:
    """What `read_shape` reads."""
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "d_model": model.width,
        **_write_stack("encoder", model.encoder),
        **_write_stack("decoder", model.decoder),
        "activation_function": activations[model.encoder.blocks[0].ffn.activation],
        "scale_embedding": model.embedder.scale != 1.0,
        "is_encoder_decoder": True,
        "vocab_size": model.vocab_size,
    }


def _write_stack(name: str, stack: StackConfig) -> dict:
    block = stack.blocks[0]
    return {
        f"{name}_layers": stack.layers,
        f"{name}_attention_heads": block.attention.heads,
        f"{name}_ffn_dim": block.ffn.hidden,
    }


def rules(model: ModelConfig) -> list[Rule]:
    """As BART's own names say; the bare model's lack "model."."""
    prefix = "model." if isinstance(model.head, FixedBiasLMHead) else ""
    return [
        Rule("embedder/embedding", f"{prefix}shared.weight"),
        *_stack_rules("encoder", f"{prefix}encoder", {"attention": "self_attn"}),
        *_stack_rules("decoder", f"{prefix}decoder",
                      {"attention": "self_attn", "cross_attention": "encoder_attn"}),
        Rule("head/fixed_bias", "final_logits_bias", Product(0)),  # [1, vocabulary]
    ]  # fmt: skip


def _stack_rules(stack: str, theirs: str, attentions: dict[str, str]) -> Iterator[Rule]:
    ours, layer = f"{stack}/*", f"{theirs}.layers.{{layer}}"
    yield Rule(f"{stack}/positions/embedding", f"{theirs}.embed_positions.weight")
    yield from norm_rules(f"{stack}/input_norm", f"{theirs}.layernorm_embedding")
    for name, module in attentions.items():
        for part, product in {"query": "q", "key": "k", "value": "v"}.items():
            yield from linear_rules(f"{ours}/{name}/{part}", f"{layer}.{module}.{product}_proj")
        yield from linear_rules(f"{ours}/{name}/out", f"{layer}.{module}.out_proj", inputs=2)
        yield from norm_rules(f"{ours}/{name}_norm", f"{layer}.{module}_layer_norm")
    yield from linear_rules(f"{ours}/ffn/up", f"{layer}.fc1")
    yield from linear_rules(f"{ours}/ffn/down", f"{layer}.fc2")
    yield from norm_rules(f"{ours}/ffn_norm", f"{layer}.final_layer_norm")


IGNORED_FIELDS = {
    "dropout": "dropout, which a run chooses",
    "attention_dropout": "dropout, which a run chooses",
    "activation_dropout": "dropout, which a run chooses",
    "classifier_dropout": "dropout, which a run chooses",
    "classif_dropout": "dropout, which a run chooses",
    "encoder_layerdrop": "dropout of layers, of training elsewhere",
    "decoder_layerdrop": "dropout of layers, of training elsewhere",
    "init_std": "of training from scratch",
    "num_labels": "of a classifier",
    "_num_labels": "of a classifier",
    "output_past": "an option of a call",
    "force_bos_token_to_be_generated": "of generation",
    "save_step": "of training elsewhere",
    "replacing_rate": "of distillation",
    "student_encoder_layers": "of distillation",
    "student_decoder_layers": "of distillation",
}
IGNORED_TENSORS = {
    r"(model\.)?(encoder|decoder)\.version": "of fairseq's file",
}
TIED = {
    f"{prefix}{name}.weight": f"{prefix}shared.weight"
    for prefix in ("model.", "")
    for name in ("encoder.embed_tokens", "decoder.embed_tokens")
} | {"lm_head.weight": "model.shared.weight"}

FAMILIES = {
    "bart": Family(
        read,
        write,
        rules,
        ignored_fields=IGNORED_FIELDS,
        ignored_tensors=IGNORED_TENSORS,
        tied=TIED,
    )
}
