"""Grad-CAM: where in an image the evidence for a class is."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cnn_jax.errors import UserError
from cnn_jax.freezing import mode_arguments
from cnn_jax.tools.figures import new_figure, save


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
        UserError: The network has no layer whose output is an image.

    Source: Selvaraju et al. 2017, "Grad-CAM", arXiv:1610.02391, equations 1 and 2.
    """
    layer = layer or image_layers(model, images)[-1]
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
        logits: Any = model.apply(variables, images, **mode_arguments(model, train=False))
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([-logits, logits], axis=-1)
    score = jnp.take_along_axis(logits, classes[:, None], axis=-1).sum()
    return score, outputs['features']


def image_layers(model: nn.Module, images: Float[Array, 'b h w c']) -> list[str]:
    """The paths of the modules whose output is [b, i, j, k], in the order in which they return.

    The last is `backbone` where there is one, in a strided net the last block's dropout, which
    in inference returns the last normalization's output.

    Errors:
        UserError: There is none.
    """
    called = []

    def intercept(call, args, kwargs, context):
        out: Any = call(*args, **kwargs)
        path = '/'.join(context.module.path)
        if path and context.method_name == '__call__' and getattr(out, 'ndim', 0) == 4:
            called.append(path)
        return out

    with nn.intercept_methods(intercept):
        mode: Any = mode_arguments(model, train=False)
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, **mode))
    if not called:
        raise UserError('the network has no layer whose output is an image; leave heat maps out')
    return called


def heat_mapper(run: Any) -> Callable[[np.ndarray, int], np.ndarray]:
    """The function from a uint8 image and a class to `grad_cam` by the network of an opened run.

    Errors:
        UserError: The network has no layer whose output is an image.
    """
    blank = jnp.zeros((1, *run.spec.image_shape), jnp.uint8)
    layer = image_layers(run.model, run.spec.prepare(blank))[-1]

    @jax.jit
    def compute(variables, image, number):
        with nn.intercept_methods(run.program.evaluating):
            return grad_cam(run.model, variables, run.spec.prepare(image), number, layer)

    return lambda image, number: np.asarray(
        compute(run.variables, image[None], np.array([number]))[0]
    )


def overlay(
    image: UInt8[np.ndarray, 'h w c'], heat: Float[np.ndarray, 'h w']
) -> UInt8[np.ndarray, 'h w 3']:
    """The heat, in [0, 1], over a grey version of the image, which shows where there is none.

    So colour means heat alone.
    """
    from matplotlib import colormaps

    grey, share = image.mean(axis=-1, keepdims=True) / 255, 0.8 * heat[..., None]
    mixed = (1 - share) * grey + share * colormaps['inferno'](heat)[..., :3]
    return np.round(255 * mixed).astype(np.uint8)


def draw_heatmap(
    image: UInt8[np.ndarray, 'h w c'], heat: Float[np.ndarray, 'h w'], title: str, path: Path
) -> None:
    """Draw a PNG of the image and its `overlay`."""
    from matplotlib.cm import ScalarMappable

    figure = new_figure(7, 3.4)
    left, right = figure.subplots(1, 2)
    left.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
    right.imshow(overlay(image, heat))
    scale = figure.colorbar(ScalarMappable(cmap='inferno'), ax=right, ticks=[0, 1])
    scale.ax.set_yticklabels(['no\nevidence', 'most'])
    for axes in (left, right):
        axes.set_axis_off()
    figure.suptitle(title, parse_math=False)  # a file's name may hold dollars
    save(figure, path)
