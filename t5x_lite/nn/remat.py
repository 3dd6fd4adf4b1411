"""What a layer keeps for the backward pass, by the name of a policy; the rest is computed again.

The modules name what is worth keeping: `LAYER_INPUT`, the residual stream as it enters a layer, and
`PROJECTIONS`, queries, keys and values (of latent attention: queries and latents).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

__all__ = ["LAYER_INPUT", "POLICIES", "PROJECTIONS", "checkpoint_name", "rematerialised"]

LAYER_INPUT = "layer_input"
PROJECTIONS = ("query", "key", "value", "latent")

_keep = jax.checkpoint_policies

# Names of policies, and what they keep beside each layer's input. What XLA needs for a product's
# gradient is its inputs, so all but products can be computed again at little cost ("minimal").
POLICIES: dict[str, Callable | None] = {
    "none": None,  # no rematerialisation: everything
    "minimal": _keep.dots_with_no_batch_dims_saveable,  # products with parameters
    "save_qkv_proj": _keep.save_only_these_names(*PROJECTIONS),
    "full": _keep.nothing_saveable,
    # The layers' inputs and the projections wait in the host's memory, so that the device keeps
    # less than with "full" and computes less again. A backend without a memory of its own, such as
    # the CPU's, keeps them where they are.
    "offload": _keep.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, *PROJECTIONS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialised(module: type[nn.Module], policy: str, scan: bool) -> type[nn.Module]:
    """The module, or one that keeps for the backward pass what `policy` of `POLICIES` says.

    In a scan nothing needs to keep the compiler from merging the second computation with the first:
    they are in different loops.
    """
    if policy == "none":
        return module
    return nn.remat(module, prevent_cse=not scan, policy=POLICIES[policy])
