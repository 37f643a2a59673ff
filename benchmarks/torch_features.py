"""The peer: VGG16's frozen convolutions as a PyTorch user runs them."""

import numpy as np
import torch
from torch import nn

from benchmarks.problem import VGG16, Problem, backbone_weights, prepared
from benchmarks.worker import Contender, forward


def backbone(weights: dict[str, np.ndarray]) -> nn.Sequential:
    """torchvision's `vgg16().features` with given weights, frozen.

    Args:
        weights: `block1_conv1/kernel` [3, 3, c, f] and so on.
    """
    layers, channels = [], 3
    for i, (width, count) in enumerate(VGG16, start=1):
        for j in range(1, count + 1):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            kernel, bias = (weights[f'block{i}_conv{j}/{part}'] for part in ('kernel', 'bias'))
            conv.weight.data = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous()
            conv.bias.data = torch.from_numpy(bias)
            layers += [conv, nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers).requires_grad_(False).eval()


def start(
    problem: Problem, layout: torch.memory_format = torch.contiguous_format, compiled: bool = False
) -> Contender:
    """Prepared images in, features out.

    Args:
        problem: Images and weights.
        layout: Of both.
        compiled: Whether `torch.compile` is used.
    """
    model = backbone(backbone_weights(problem)).to(memory_format=layout)
    if compiled:
        model = torch.compile(model)

    @torch.inference_mode()
    def features(x: torch.Tensor) -> np.ndarray:
        return model(x).permute(0, 2, 3, 1).numpy()

    batches = torch.from_numpy(prepared(problem)).permute(0, 1, 4, 2, 3)
    batches = [batch.contiguous(memory_format=layout) for batch in batches]
    return forward(features, batches, f'torch {torch.__version__}')


def channels_last(problem: Problem) -> Contender:
    """The same with channels on the minor axis."""
    return start(problem, torch.channels_last)


def compiled(problem: Problem) -> Contender:
    """The same by `torch.compile`; its user sets TORCHINDUCTOR_FREEZING."""
    return start(problem, torch.channels_last, compiled=True)
