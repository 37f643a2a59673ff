"""Grad-CAM: where in an image the evidence for a class is."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cnn_jax.cache import write_atomically


def grad_cam(
    model: nn.Module,
    variables: dict,
    images: Float[Array, 'b h w c'],
    classes: Int[Array, ' b'],
    layer: str,
) -> Float[Array, 'b h w']:
    """Heat maps of the evidence for one class of each image.

    L = ReLU(Σ_k α_k A_k),  α_k = mean over positions of ∂z_class/∂A_k

    with A the output of `layer` and z the class's logit (of a single output: z, or −z for class
    0). Each map is scaled to a maximum of 1 (an all-zero one stays) and enlarged to the image.

    Args:
        model: Called as `model(images, train=False)`.
        variables: Its parameters and batch statistics.
        images: Prepared as the network expects them.
        classes: Class numbers.
        layer: Path of a module whose output is [b, i, j, k], e.g. `backbone`.

    Returns:
        Heat in [0, 1], of the images' height and width.

    Source: Selvaraju et al. 2017, "Grad-CAM", equations 1 and 2.
    """

    def logits_and_features(shift):
        seen = {}

        def intercept(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if context.method_name == '__call__' and '/'.join(context.module.path) == layer:
                seen['features'] = out
                # Adding zero leaves the output, and its gradient is that of the features.
                out = out if shift is None else out + shift
            return out

        with nn.intercept_methods(intercept):
            logits: Any = model.apply(variables, images, train=False)
        if logits.shape[-1] == 1:
            logits = jnp.concatenate([-logits, logits], axis=-1)
        score = jnp.take_along_axis(logits, classes[:, None], axis=-1).sum()
        return score, seen['features']

    shape = jax.eval_shape(lambda: logits_and_features(None)[1])
    gradient, features = jax.grad(logits_and_features, has_aux=True)(
        jnp.zeros(shape.shape, shape.dtype)
    )
    weights = gradient.mean(axis=(1, 2), keepdims=True)
    heat = nn.relu((weights * features).sum(axis=-1)).astype(jnp.float32)
    peak = heat.max(axis=(1, 2), keepdims=True)
    heat = heat / jnp.where(peak > 0, peak, 1.0)
    return jax.image.resize(heat, images.shape[:3], 'bilinear')


def default_layer(model: nn.Module, images: Float[Array, 'b h w c']) -> str:
    """The path of the last module, in the order of the calls, whose output is still an image."""
    called = []

    def intercept(call, args, kwargs, context):
        out: Any = call(*args, **kwargs)
        path = '/'.join(context.module.path)
        if path and context.method_name == '__call__' and out.ndim == 4:
            called.append((len(called), path))
        return out

    with nn.intercept_methods(intercept):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return called[-1][1]


def draw_heatmap(
    image: UInt8[np.ndarray, 'h w c'], heat: Float[np.ndarray, 'h w'], title: str, path: Path
) -> None:
    """A PNG with the image beside the same image under its heat map."""
    from matplotlib.figure import Figure

    shown = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
    figure = Figure(figsize=(6.4, 3.4), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.imshow(shown)
    right.imshow(shown)
    right.imshow(heat, cmap='inferno', alpha=0.55, vmin=0, vmax=1)
    for axes in (left, right):
        axes.set_axis_off()
    figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=110))
