"""A model as data: frozen configs, composed of the unions that each part's file offers."""

import dataclasses

from t5x_lite.errors import UserError
from t5x_lite.nn.blocks import BlockConfig, BlockKind, Pattern, Section, Shared, sections
from t5x_lite.nn.embedders import (
    Embedder,
    InputProjection,
    TokenEmbedder,
    TrigramEmbedder,
)
from t5x_lite.nn.heads import (
    HeadConfig,
    LanguageModelHead,
    PairedLMHead,
    QuestionAnswering,
    SequenceClassifier,
)
from t5x_lite.nn.kernels import require_kernel
from t5x_lite.nn.layers import FanIn, Initializer, NormConfig, require_rate
from t5x_lite.nn.positions import LearnedPositions, PositionsConfig
from t5x_lite.nn.remat import POLICIES

__all__ = ["BlockConfig", "ModelConfig", "Pattern", "Shared", "StackConfig"]

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """An encoder or a decoder: input, `layers` blocks, output."""

    layers: int
    block: BlockKind | Pattern | Shared
    causal: bool
    positions: PositionsConfig | None = None
    embedder: Embedder | None = None  # None: the model's, which both stacks share
    input_norm: NormConfig | None = None
    input_dropout: float | int = 0.0
    final_norm: NormConfig | None = None
    final_dropout: float | int = 0.0
    input_projection: InputProjection | None = None  # after the input's norm and dropout

    def __post_init__(self):
        if self.layers < 1:
            raise UserError(f"layers={self.layers}: a stack has at least one layer.")
        require_rate("input_dropout", self.input_dropout)
        require_rate("final_dropout", self.final_dropout)

    @property
    def sections(self) -> tuple[Section, ...]:
        """Its runs of layers that are compiled together."""
        return sections(self.block, self.layers)

    @property
    def blocks(self) -> tuple[BlockKind, ...]:
        """The block of every layer."""
        return tuple(b for section in self.sections for b in section.blocks * section.repeats)

    def check_length(self, length: int) -> None:
        """Raises `UserError` where learned positions are fewer than `length`."""
        if isinstance(self.positions, LearnedPositions):
            known = self.positions.max_length
            if length > known:
                raise UserError(f"length={length} exceeds the model's {known} learned positions; "
                                f"set LENGTH to {known} or less.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A transformer of any family: encoder-only, decoder-only, or both."""

    vocab_size: int
    width: int
    embedder: TokenEmbedder | TrigramEmbedder
    head: HeadConfig
    encoder: StackConfig | None = None
    decoder: StackConfig | None = None
    init: Initializer = dataclasses.field(default_factory=FanIn)
    vocab_multiple: int = 128  # the physical vocabulary is rounded up to it: TPU lanes, sharding
    dtype: str = "float32"  # of the computation; parameters are float32
    scan: bool = True  # compile one layer and loop, instead of all layers in a row
    attention_kernel: str = "auto"  # of `kernels.KERNELS`
    remat: str = "none"  # what layers keep for the backward pass: a name of `remat.POLICIES`

    def __post_init__(self):
        for name in ("vocab_size", "width", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}.")
        if self.remat not in POLICIES:
            raise UserError(f"remat={self.remat!r} must be one of {', '.join(POLICIES)}.")
        require_kernel(self.attention_kernel)
        if self.encoder is None and self.decoder is None:
            raise UserError("a model needs an encoder, a decoder, or both.")
        self._check_widths()
        blocks = () if self.decoder is None else self.decoder.blocks
        reads = {block.cross_attention is not None for block in blocks}
        if reads - {self.kind == "encoder-decoder"}:
            raise UserError("a decoder has cross_attention exactly where there is an encoder.")

    def _check_widths(self):
        if isinstance(self.embedder, TrigramEmbedder):
            if self.decoder is not None:
                raise UserError("TrigramEmbedder shows each token the next one: encoders only.")
            return
        narrow = self.embedder.width
        for stack in (self.encoder, self.decoder):
            shares = stack is not None and stack.embedder is None
            if shares and narrow not in (None, self.width) and stack.input_projection is None:
                raise UserError(
                    f"embeddings of width {narrow} need an input_projection to the model's width "
                    f"of {self.width}."
                )

    @property
    def kind(self) -> str:
        """Which family of transformers this is."""
        if self.decoder is None:
            return "encoder-only"
        return "decoder-only" if self.encoder is None else "encoder-decoder"

    @property
    def predicts(self) -> str:
        """What the head predicts.

        "next" or "masked" tokens, the latter and "pairs" of texts, "labels", "spans", or "none".
        """
        if isinstance(self.head, PairedLMHead):
            return "pairs"
        if isinstance(self.head, LanguageModelHead):
            return "masked" if self.decoder is None else "next"
        others = {SequenceClassifier: "labels", QuestionAnswering: "spans"}
        return others.get(type(self.head), "none")

    @property
    def main(self) -> StackConfig:
        """The stack whose outputs the head reads."""
        return self.decoder or self.encoder

    @property
    def physical_vocab(self) -> int:
        """Rows of the embedding table: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def check_lengths(self, length: int, target_length: int | None = None) -> None:
        """Raises `UserError` where a stack can't take sequences this long."""
        if self.kind == "encoder-decoder":
            self.encoder.check_length(length)
            self.decoder.check_length(target_length or length)
        else:
            self.main.check_length(length)


def compiled(model: ModelConfig, attention_kernel: str, remat: str | None = None) -> ModelConfig:
    """The same model, computed in another way.

    Args:
        model: which one.
        attention_kernel: of `kernels.KERNELS`.
        remat: of `remat.POLICIES`; None: the model's own.
    """
    remat = model.remat if remat is None else remat
    return dataclasses.replace(model, attention_kernel=attention_kernel, remat=remat)
