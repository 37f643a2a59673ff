"""A table of a network's layers: output shapes, parameters, operations."""

import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from cnn_jax import freezing


@dataclass(frozen=True)
class Layer:
    """A row of the summary; `flops` are those of the forward pass for one example."""

    path: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    flops: int


def layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[Layer]:
    """The layers that a forward pass calls, in that order: what calls no other or has parameters.

    FLOPs are 2 · (positions) · (kernel elements) for each call, position meaning a pixel of a
    convolution's output or a Dense layer's example: every multiplication and addition of the
    products, padding included, as the literature counts them. Bias, norm and activation are left
    out (about 1%), and the products without a kernel, those of attention.

    Args:
        model: Any Linen module that maps images to logits; only shapes are computed.
        input_shape: Shape of one example: height, width, channels.
    """
    rows: dict[tuple[str, ...], Layer] = {}

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        module = context.module
        if context.method_name == '__call__':
            inside = meta.unbox(module.variables.get('params', {}))
            own = {name: leaf for name, leaf in inside.items() if hasattr(leaf, 'size')}
            kernel, before = own.get('kernel'), rows.get(module.path)
            shapes = [leaf.shape for leaf in jax.tree.leaves(y) if hasattr(leaf, 'shape')]
            shape = shapes[0] if shapes else ()  # of several outputs the first
            features = getattr(module, 'features', None)  # of a backbone a method
            features = features if isinstance(features, (int, tuple)) else shape[-1:]
            positions = math.prod(shape) // int(np.prod(features))
            flops = 0 if kernel is None else 2 * positions * kernel.size
            rows[module.path] = Layer(
                path='/'.join(module.path),
                kind=type(module).__name__,
                output=shape[1:],
                parameters=sum(leaf.size for leaf in own.values()),
                flops=flops + (before.flops if before else 0),
            )
        return y

    x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    mode: dict[str, Any] = freezing.mode_arguments(model, train=False)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **mode), x)
    inner = {path[:depth] for path in rows for depth in range(len(path))}
    return [row for path, row in rows.items() if path not in inner or row.parameters]


def summary(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """The network as a table of at most 100 columns, its totals in the last line."""
    return table_of(layers(model, input_shape))


def table_of(rows: list[Layer]) -> str:
    """The table of a `summary`, from its rows."""
    name, kind = (max(map(len, cells)) for cells in zip(*((row.path, row.kind) for row in rows)))
    line = f'{{:{name}}}  {{:<{max(kind, 10)}}}  {{:>14}}  {{:>12}}  {{:>10}}'
    table = [line.format('layer', 'type', 'output', 'parameters', 'MFLOP')]
    for row in rows:
        output = '×'.join(map(str, row.output))
        flops = f'{row.flops / 1e6:,.2f}' if row.flops else '-'
        table.append(line.format(row.path, row.kind, output, f'{row.parameters:,}', flops))
    parameters = sum(row.parameters for row in rows)
    table.append(
        f'total: {parameters:,} parameters ({parameters * 4 / 1e6:,.1f} MB in float32), '
        f'{sum(row.flops for row in rows) / 1e9:.3f} GFLOP forward an example'
    )
    return '\n'.join(table)
