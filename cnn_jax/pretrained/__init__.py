"""Pretrained VGG16 weights: sources, file formats, digests and preprocessing."""
