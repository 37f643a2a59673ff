"""Ablations: arms tuned alike, trained over replicates, compared in pairs, reported."""

from cnn_jax.ablation.plan import linear, log

__all__ = ['linear', 'log']
