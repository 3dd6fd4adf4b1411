"""The one transformer: blocks, stacks of them, and the model of any family around them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_lite.nn import kernels, layers, masks, pipeline
from t5x_lite.nn.attention import LayerInputs
from t5x_lite.nn.blocks import ACTIVATION, Round, concatenate
from t5x_lite.nn.cache import Cache, write_slots
from t5x_lite.nn.config import ModelConfig, StackConfig
from t5x_lite.nn.heads import HeadInputs
from t5x_lite.nn.positions import PositionModule
from t5x_lite.nn.quantized import QuantizedTraining
from t5x_lite.nn.remat import rematerialised
from t5x_lite.partitioning import Sharding, constrain
from t5x_lite.types import Batch, KeyArray, Output


class Stack(nn.Module):
    """An encoder or a decoder; scanned over stacked parameters, or unrolled."""

    config: StackConfig
    width: int
    common: layers.Common
    scan: bool
    remat: str

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T _"], cache: Cache | None, batch: Batch, inputs: LayerInputs
    ) -> tuple[Float[Array, "B T D"], Cache | None, dict[str, Array]]:
        """Runs all layers over embedded tokens; `batch` gives their segments and positions.

        `inputs` brings what only the caller knows: the encoder's output and the dropout keys.
        """
        c = self.config
        # The first layer that has attention; learned positions need none.
        found = (getattr(block, "attention", None) for block in c.blocks)
        attention = next(filter(None, found), None)
        heads, size = (attention.heads, attention.head_dim) if attention else (0, 0)
        positions = PositionModule()
        if c.positions is not None:
            positions = c.positions.build(heads, size, c.causal, self.common, "positions")
        pos_BT = _positions(batch, x_BTD.shape[1], cache)
        placed = positions.embed(pos_BT, x_BTD.shape[2])
        x_BTD = x_BTD if placed is None else x_BTD + placed
        if c.input_norm is not None:
            x_BTD = c.input_norm.build(self.common, "input_norm")(x_BTD)
        keys = inputs.dropout_keys
        # Layers count from 0; the sites outside them come after the last one.
        x_BTD = layers.dropout(x_BTD, c.input_dropout, layers.fold_in(keys, c.layers))
        if c.input_projection is not None:
            x_BTD = c.input_projection.build(self.width, self.common, "input_projection")(x_BTD)
        x_BTD = constrain(x_BTD, ACTIVATION, self.common.sharding)
        cache, inputs = _look(c.causal, cache, batch, pos_BT, positions, inputs)
        if self._is_plain(inputs, x_BTD, heads, size):
            inputs = inputs.stored()
        x_BTD, (caches, aux) = self._layers(x_BTD, cache, inputs)
        if c.final_norm is not None:
            x_BTD = c.final_norm.build(self.common, "final_norm")(x_BTD)
        x_BTD = layers.dropout(x_BTD, c.final_dropout, layers.fold_in(keys, c.layers + 1))
        if cache is not None:
            cache = cache.replace(layers=caches, index=cache.index + pos_BT.shape[1])
        return x_BTD, cache, aux

    def _is_plain(self, inputs, x_BTD, heads: int, size: int) -> bool:
        """Whether layers, as far as they are alike, will look at whole masks and biases."""
        common, sees = self.common, inputs.sees
        shape = x_BTD.shape[0], heads, sees.order_q.shape[1], sees.order_k.shape[1]
        work = kernels.Work.of(shape, size, common.dtype, sees, inputs.bias)
        asked, platform = common.attention_kernel, common.platform
        return kernels.choose(asked, platform, work, common.sharding) == "plain"

    def _layers(self, x_BTD, cache, inputs):
        caches, auxiliaries = {}, []
        for section in self.config.sections:
            own = None if cache is None else cache.layers[section.name]
            run = self._how(section, cache)
            x_BTD, (caches[section.name], aux) = run(section, x_BTD, own, inputs)
            if isinstance(section.block, Round):  # [rounds, layers of one] → [layers]
                aux = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)
            auxiliaries.append(aux)
        return x_BTD, (caches, concatenate(auxiliaries))

    def _how(self, section, cache):
        if not (self.scan and section.name in ("layers", "shared")):
            return self._unrolled
        # Decoding, a token at a time, has no microbatches to fill a pipeline with.
        piped = section.stacked and cache is None and pipeline.stages(self.common.sharding) > 1
        return self._piped if piped and not self.is_initializing() else self._scanned

    def _piped(self, section, x_BTD, caches, inputs):
        module = rematerialised(section.block.module(), self.remat, scan=True)
        x_BTD, aux = pipeline.run(module, section, self.common, self.scope, x_BTD, inputs)
        return x_BTD, (caches, aux)

    def _scanned(self, section, x_BTD, caches, inputs):
        block = section.block
        scanned = nn.scan(
            rematerialised(block.module(), self.remat, scan=True),
            variable_axes={"params": 0} if section.stacked else {},
            variable_broadcast=False if section.stacked else "params",
            split_rngs={"params": section.stacked},
            in_axes=(0, 0, nn.broadcast),
            out_axes=0,
            length=section.repeats,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        numbers = section.first + len(section.blocks) * jnp.arange(section.repeats)
        return scanned(block, self.common, name=section.name)(x_BTD, caches, numbers, inputs)

    def _unrolled(self, section, x_BTD, caches, inputs):
        block, results = section.block, []
        module = rematerialised(block.module(), self.remat, scan=False)
        layer = None
        for number in range(section.repeats):
            own = jax.tree.map(lambda leaf, n=number: leaf[n], caches)
            if section.stacked or layer is None:
                name = f"{section.name}_{number}" if section.stacked else section.name
                layer = module(block, self.common, name=name)
            place = section.first + number * len(section.blocks)
            x_BTD, result = layer(x_BTD, own, place, inputs)
            results.append(result)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _positions(batch: Batch, length: int, cache: Cache | None):
    """The batch's positions; without any, one row that serves them all and goes on in the cache."""
    if "positions" in batch:
        return batch["positions"]
    start = 0 if cache is None else cache.index
    return (start + jnp.arange(length, dtype=jnp.int32))[None]


def _look(causal, cache, batch, pos_BT, positions, inputs):
    """Masks, bias and rotation for all layers: what each query may look at, and from how far."""
    seg_q = batch.get("segments")
    if cache is None:
        seg_k, index = seg_q, None
        # Slots tell distances as well as positions, which are consecutive within a segment, and
        # one row of them serves the whole batch.
        order_q = order_k = masks.slots(pos_BT.shape[1])
    else:
        seg_q = jnp.ones_like(batch["tokens"]) if seg_q is None else seg_q
        pos_BT = jnp.broadcast_to(pos_BT, seg_q.shape)
        cache, index = write_slots(cache, seg_q, pos_BT), cache.index
        seg_k, order_q, order_k = cache.segments_BS, pos_BT, cache.positions_BS
    prefix = {}
    if causal and "prefix" in batch:
        prefix_q = batch["prefix"]
        prefix = {"prefix_q": prefix_q, "prefix_k": _prefix_slots(prefix_q, cache)}
    sees = masks.Visibility(
        order_q, order_k, seg_q, seg_k, **prefix, causal=causal, slotted=cache is None
    )
    inputs = inputs.replace(
        sees=sees,
        bias=positions.bias(),
        rotation=positions.rotate(pos_BT),
        positions_BT=pos_BT,
        segments_BT=seg_q,
        causal=causal,
        cache_index=index,
    )
    return cache, inputs


def _prefix_slots(prefix_BT, cache):
    """`prefix` of the keys. A prefix is read in one call, so the cache needs to keep none of it."""
    if cache is None:
        return prefix_BT
    empty = jnp.zeros_like(cache.segments_BS)
    return jax.lax.dynamic_update_slice_in_dim(empty, prefix_BT, cache.index, axis=1)


class Transformer(nn.Module):
    """The model that a config describes."""

    config: ModelConfig
    sharding: Sharding | None = None
    quantized: QuantizedTraining | None = None  # while training

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        dropout_keys: KeyArray | None = None,
        cache: Cache | None = None,
        capture: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            batch: see types.Batch. An encoder-decoder's later decoding steps leave out the
                encoder's part, which the cache holds.
            dropout_keys: one key a row, [B]; None turns dropout off.
            cache: None for training and scoring; else from `init_cache` or the previous call.
            capture: also keep every layer's output, [L, B, T, D], in aux["layer_outputs_BTD"] and,
                of an encoder before a decoder, aux["encoder_layer_outputs_BTD"].

        Returns:
            The hidden states of every token with the unembedding, the new cache, auxiliaries.
        """
        c, aux = self.config, {}
        common = self._common(c.main)
        shared = c.embedder.build(c.physical_vocab, c.width, common, "embedder")
        inputs = LayerInputs(dropout_keys=layers.fold_in(dropout_keys, 1), capture=capture)
        if c.kind == "encoder-decoder":
            inputs, cache, aux = self._encode(shared, batch, dropout_keys, cache, inputs)
        name = "decoder" if c.decoder is not None else "encoder"
        hidden_BTD, cache, main_aux = self._stack(name, shared, batch, cache, inputs)
        head = c.head.build(c.vocab_size, c.physical_vocab, common, "head")
        keys = layers.fold_in(dropout_keys, 2)  # 0 and 1 are the stacks'
        output = head(hidden_BTD, HeadInputs(shared.table_VD, batch.get("segments"), keys))
        return output.replace(cache=cache, aux={**aux, **main_aux, **output.aux})

    def _stack(self, name, shared, batch, cache, inputs):
        stack = getattr(self.config, name)
        common, embed = self._common(stack), shared
        if stack.embedder is not None:
            vocab, width = self.config.physical_vocab, self.config.width
            embed = stack.embedder.build(vocab, width, common, f"{name}_embedder")
        c = self.config
        run = Stack(stack, c.width, common, c.scan, c.remat, name=name)
        return run(embed(batch), cache, batch, inputs)

    def _encode(self, shared, batch, dropout_keys, cache, inputs):
        """Runs the encoder and gives the decoder its output, or what the cache kept of it."""
        part = {
            key.removeprefix("encoder_"): value
            for key, value in batch.items()
            if key.startswith("encoder_")
        }
        aux = {}
        if part:
            encoder_inputs = LayerInputs(
                dropout_keys=layers.fold_in(dropout_keys, 0), capture=inputs.capture
            )
            memory_BSD, _, aux = self._stack("encoder", shared, part, None, encoder_inputs)
            segments_BS = part.get("segments")
            inputs = inputs.replace(memory_BSD=memory_BSD)
            if cache is not None:
                if segments_BS is None:
                    segments_BS = jnp.ones(memory_BSD.shape[:2], jnp.int32)
                cache = cache.replace(memory_segments_BS=segments_BS)
        else:
            segments_BS = cache.memory_segments_BS
        slots, seen = (memory_BSD if part else segments_BS).shape[1], {}
        if segments_BS is not None:
            segments_BT = batch.get("segments", jnp.ones_like(batch["tokens"]))
            seen = {"segments_q": segments_BT, "segments_k": segments_BS}
        sees = masks.everything(batch["tokens"].shape[1], slots, **seen)
        # In decoding it goes on row by row: slots are the cache's, not the queries'.
        inputs = inputs.replace(memory_sees=sees.replace(slotted=cache is None))
        return inputs, cache, {f"encoder_{key}": value for key, value in aux.items()}

    def _common(self, stack: StackConfig) -> layers.Common:
        """The initial gain of what is added to the residual stream depends on the stack's depth."""
        init, gain = self.config.init, 1.0
        if isinstance(init, layers.Normal) and init.depth_scaled:
            gain = (2 * stack.layers) ** -0.5
        return layers.Common(
            self.config.dtype, init, gain, self.sharding, self.config.attention_kernel,
            kernels.platform_of(self.sharding), self.quantized,
        )  # fmt: skip
