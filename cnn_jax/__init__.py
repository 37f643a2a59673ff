"""Convolutional nets in JAX and Flax: what a regularizer buys, and how a frozen VGG16 transfers."""

__version__ = '0.1.0'
