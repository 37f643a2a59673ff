"""VGG16 from an ONNX graph, read as data: nothing of it is run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.pretrained.layout import CONVOLUTIONS
from cnn_jax.pretrained.stored import Contents, Stored, add
from cnn_jax.pretrained.torch_layout import canonical, canonical_name

_KERAS = re.compile(r'block\d+_conv\d+')


@contextmanager
def open_onnx(path: Path) -> Iterator[Contents]:
    """The contents of an ONNX graph.

    Convolutions are known by their place in the graph, since exporters rename tensors; where a
    name tells the layer, it must agree. The top cannot be read from ONNX.
    """
    import onnx

    # Tensors in files beside the model are refused below, not loaded.
    graph = onnx.load(path, load_external_data=False).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    if len(values) != len(graph.initializer):
        raise UserError(f'{path} names two tensors alike; export the model again')
    convolutions = [node for node in graph.node if node.op_type == 'Conv']
    if len(convolutions) != len(CONVOLUTIONS):
        raise UserError(
            f'{path} has {len(convolutions)} convolutions where VGG16 has {len(CONVOLUTIONS)}; '
            'give a file of this network'
        )
    tensors: dict[str, Stored] = {}
    layouts = set()
    for layer, node in zip(CONVOLUTIONS, convolutions):
        layouts.add(_layout(layer, list(node.input), path))
        for tensor, name in zip(('kernel', 'bias'), node.input[1:]):
            if name in values:
                ours = f'{layer}/{tensor}'
                add(tensors, ours, canonical(ours, _stored(values.pop(name), path)), path)
    for name, tensor in values.items():
        add(tensors, name, _stored(tensor, path), path)
    yield Contents(tensors, layouts.pop() if len(layouts) == 1 else '')


def _stored(tensor, path: Path) -> Stored:
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UserError(f'{path} keeps {tensor.name} in another file; save the model in one')
    return Stored(
        tuple(tensor.dims),
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name,
        lambda: onnx.numpy_helper.to_array(tensor),
    )


def _layout(layer: str, names: list[str], path: Path) -> str:
    """Whose names a convolution's tensors have: 'keras', 'torch' or ''."""
    layout = ''
    for name in names[1:]:
        if found := _KERAS.search(name):
            layout, named = 'keras', found[0]
        elif canonical_name(name) != name:
            layout, named = 'torch', canonical_name(name).split('/')[0]
        else:
            continue
        if named != layer:
            raise UserError(f'{path} has {named} where VGG16 has {layer}; give a file of VGG16')
    return layout
