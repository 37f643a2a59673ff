"""Layers: Flax modules, and the pure functions under them."""
