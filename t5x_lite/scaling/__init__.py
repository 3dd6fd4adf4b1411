"""Scaling laws: fits of loss against size and data."""
