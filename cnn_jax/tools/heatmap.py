"""Grad-CAM: where in an image the evidence for a class is."""

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cnn_jax.errors import UserError
from cnn_jax.tools.figures import save


def grad_cam(
    model: nn.Module,
    variables: dict,
    images: Float[Array, 'b h w c'],
    classes: Int[Array, ' b'],
    layer: str | None = None,
) -> Float[Array, 'b h w']:
    """Heat maps of the evidence for one class of each image (Grad-CAM).

    L = ReLU(Σ_k α_k A_k),  α_k = mean over positions of ∂z_class/∂A_k

    with A the output [b, i, j, k] of `layer` (default: the last of `image_layers`, which the head
    reads) and z the class's logit (of a single output: z, or −z for class 0). Each map is scaled
    to a maximum of 1 (an all-zero one stays) and enlarged to the image.

    Errors:
        UserError: The network has no such layer.

    Source: Selvaraju et al. 2017, "Grad-CAM", arXiv:1610.02391, equations 1 and 2.
    """
    known = image_layers(model, images)
    layer = layer or known[-1]
    if layer not in known:
        raise UserError(
            f'the network has no layer {layer!r} whose output is an image; choose one of '
            f'{", ".join(known)}'
        )

    score = functools.partial(_score, model, variables, images, classes, layer)
    shape = jax.eval_shape(lambda: score(None)[1])
    gradient, features = jax.grad(score, has_aux=True)(jnp.zeros(shape.shape, shape.dtype))
    gradient, features = gradient.astype(jnp.float32), features.astype(jnp.float32)
    weights = gradient.mean(axis=(1, 2), keepdims=True)
    heat = nn.relu((weights * features).sum(axis=-1))
    peak = heat.max(axis=(1, 2), keepdims=True)
    heat = heat / jnp.where(peak > 0, peak, 1.0)
    return jax.image.resize(heat, images.shape[:3], 'bilinear')


def _score(model, variables, images, classes, layer: str, shift) -> tuple[Array, Array]:
    """The classes' summed logits, and the output of a layer, to which `shift` is added."""
    outputs = {}

    def intercept(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == '__call__' and '/'.join(context.module.path) == layer:
            outputs['features'] = out
            # Adding zero leaves the output, and its gradient is that of the features.
            out = out if shift is None else out + shift
        return out

    with nn.intercept_methods(intercept):
        logits: Any = model.apply(variables, images, train=False)
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([-logits, logits], axis=-1)
    score = jnp.take_along_axis(logits, classes[:, None], axis=-1).sum()
    return score, outputs['features']


def image_layers(model: nn.Module, images: Float[Array, 'b h w c']) -> list[str]:
    """The paths of the modules whose output is [b, i, j, k], in the order in which they return.

    The last is `backbone` in a fine-tuned VGG16, in a strided net the last block's dropout, which
    in inference returns the last normalization's output.
    """
    called = []

    def intercept(call, args, kwargs, context):
        out: Any = call(*args, **kwargs)
        path = '/'.join(context.module.path)
        if path and context.method_name == '__call__' and out.ndim == 4:
            called.append(path)
        return out

    with nn.intercept_methods(intercept):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return called


def draw_heatmap(
    image: UInt8[np.ndarray, 'h w c'], heat: Float[np.ndarray, 'h w'], title: str, path: Path
) -> None:
    """Draw a PNG of the image, and of the heat, in [0, 1], over a grey version of it.

    So colour means heat alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout='constrained')
    left, right = figure.subplots(1, 2)
    grey = {'cmap': 'gray', 'vmin': 0, 'vmax': 255}
    left.imshow(image[..., 0] if image.shape[-1] == 1 else image, **grey)
    right.imshow(image.mean(axis=-1), **grey)
    overlay = right.imshow(heat, cmap='inferno', alpha=0.55, vmin=0, vmax=1)
    scale = figure.colorbar(overlay, ax=right, ticks=[0, 1])
    scale.ax.set_yticklabels(['no\nevidence', 'most'])
    for axes in (left, right):
        axes.set_axis_off()
    figure.suptitle(title, parse_math=False)  # a file's name may hold dollars
    save(figure, path)
