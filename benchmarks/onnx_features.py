"""The peer: VGG16's frozen convolutions as a graph for ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from benchmarks.problem import VGG16, Problem, prepared
from benchmarks.worker import Contender, forward


def start(problem: Problem) -> Contender:
    """Prepared images in, features out; ONNX Runtime has channels before pixels."""
    nodes, tensors, x = [], [], 'images'

    def add(kind, name, *inputs, **attributes):
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    for i, (_, count) in enumerate(VGG16, start=1):
        for j in range(1, count + 1):
            name = f'block{i}_conv{j}'
            kernel, bias = (problem.weights[f'backbone/{name}/{p}'] for p in ('kernel', 'bias'))
            kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
            tensors += [
                numpy_helper.from_array(value, f'{name}/{part}')
                for part, value in (('kernel', kernel), ('bias', bias))
            ]
            x = add('Conv', name, x, f'{name}/kernel', f'{name}/bias', pads=[1, 1, 1, 1])
            x = add('Relu', f'{name}/relu', x)
        x = add('MaxPool', f'block{i}_pool', x, kernel_shape=[2, 2], strides=[2, 2])
    batches = np.ascontiguousarray(prepared(problem).transpose(0, 1, 4, 2, 3))
    images, features = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (('images', batches.shape[1:]), (x, None))
    )
    graph = helper.make_graph(nodes, 'vgg16', [images], [features], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider']
    )

    def compute(images: np.ndarray) -> np.ndarray:
        (found,) = session.run([x], {'images': images})
        return found.transpose(0, 2, 3, 1)

    return forward(compute, list(batches), f'onnxruntime {onnxruntime.__version__}')
