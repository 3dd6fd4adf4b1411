"""Flax Linen modules: configs in, pure functions of (params, inputs) out."""
