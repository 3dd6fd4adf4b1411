"""A published config.json, read field by field; what nobody read is refused."""

from collections.abc import Collection, Mapping
from typing import Any

from t5x_lite.errors import UserError

_REQUIRED = object()

# Fields of every family that don't change what the model computes, and why each may be ignored.
IGNORED: Mapping[str, str] = {
    "model_type": "chose the family",
    "architectures": "chose the head",
    "transformers_version": "who wrote the file",
    "_name_or_path": "where the file was",
    "torch_dtype": "of the stored tensors, which say it themselves",
    "dtype": "of the stored tensors, which say it themselves",
    "use_cache": "t5x_lite's cache is an argument",
    "output_attentions": "an option of a call",
    "output_hidden_states": "an option of a call",
    "return_dict": "an option of a call",
    "pad_token_id": "padding is told by segments; the tokenizer has the id",
    "bos_token_id": "the tokenizer's",
    "eos_token_id": "the tokenizer's",
    "sep_token_id": "the tokenizer's",
    "cls_token_id": "the tokenizer's",
    "mask_token_id": "the tokenizer's",
    "unk_token_id": "the tokenizer's",
    "decoder_start_token_id": "the tokenizer's",
    "forced_bos_token_id": "of generation",
    "forced_eos_token_id": "of generation",
    "initializer_range": "of training from scratch",
    "gradient_checkpointing": "remat, which is chosen here",
    "chunk_size_feed_forward": "computes the same in parts",
    "is_encoder_decoder": "follows from the family",
    "tokenizer_class": "the tokenizer's",
    "prefix": "of a pipeline's text",
    "task_specific_params": "of generation",
    "problem_type": "of the loss, which a task chooses",
    "finetuning_task": "a note",
    "id2label": "names of labels, kept beside the checkpoint",
    "label2id": "names of labels, kept beside the checkpoint",
    "pretraining_tp": "how the trainer split products; computes the same up to rounding",
    "auto_map": "code of the hub, never run",
    "_attn_implementation": "which kernel computes the same attention",
    "attn_implementation": "which kernel computes the same attention",
    "_attn_implementation_autoset": "which kernel computes the same attention",
    "reference_compile": "how it is compiled",
    "max_length": "of generation",
    "min_length": "of generation",
    "do_sample": "of generation",
    "early_stopping": "of generation",
    "num_beams": "of generation",
    "length_penalty": "of generation",
    "no_repeat_ngram_size": "of generation",
    "bad_words_ids": "of generation",
    "use_bfloat16": "of training elsewhere",
    "layer_types": "checked against the pattern that the family's other fields give",
}


class Fields:
    """The fields of one config.json; remembers which were read.

    Args:
        config: the file's object.
        ignored: fields of this family that may be ignored, each with the reason.
        tensors: names of the stored tensors, where they are known; some configs leave it to them
            whether a head is tied.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        ignored: Mapping[str, str] | None = None,
        tensors: Collection[str] | None = None,
    ):
        self._config, self.tensors = dict(config), tensors
        self._ignored = {**IGNORED, **(ignored or {})}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._config.get(name) is not None

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field's value; null counts as missing.

        Raises:
            UserError: it is missing and has no default.
        """
        self._read.add(name)
        value = self._config.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise UserError(f"config.json has no {name!r}, which {self.family} needs.")
        return default

    def take_null(self, name: str, default: Any) -> Any:
        """A field's value, where null doesn't mean what leaving it out does."""
        self._read.add(name)
        return self._config.get(name, default)

    def expect(self, name: str, *allowed: Any) -> None:
        """Raises `UserError` unless a field is missing or has one of these values."""
        self._read.add(name)
        value = self._config.get(name)
        if value is not None and value not in allowed:
            raise UserError(
                f"config.json has {name}={value!r}, which t5x_lite doesn't compute; it knows "
                f"{', '.join(map(repr, allowed))}."
            )

    @property
    def family(self) -> str:
        """The model_type."""
        return str(self._config.get("model_type"))

    @property
    def architecture(self) -> str:
        """The class of `transformers` that the tensors are of, such as LlamaForCausalLM."""
        return next(iter(self._config.get("architectures") or [""]), "")

    def finish(self) -> None:
        """Raises `UserError` where a field was neither read nor is ignored on purpose."""
        unknown = sorted(set(self._config) - self._read - set(self._ignored))
        unknown = [name for name in unknown if self._config[name] is not None]
        if unknown:
            shown = ", ".join(f"{name}={self._config[name]!r}" for name in unknown)
            raise UserError(
                f"config.json of {self.family} has fields that t5x_lite doesn't know: {shown}. "
                "They may change what the model computes; remove those that don't."
            )
