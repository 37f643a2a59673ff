"""The peer: the training step as a PyTorch user writes it.

With a stride, padding=1 begins a pixel before the image where SAME ends one after it. Mirrored
images and kernels make the two the same, and PyTorch keeps the padding that costs it nothing.
"""

import itertools

import torch
from torch import nn

from benchmarks.problem import Problem, kernels, prepared
from benchmarks.worker import Contender

STEM = 7, 2  # kernel and stride


def network(problem: Problem, *, dropout: bool) -> nn.Sequential:
    """The problem's network with the problem's weights, mirrored."""
    net = problem.config['model']
    rate, head_rate = (net['dropout'], net['head_dropout']) if dropout else (0.0, 0.0)
    norms = {'eps': net['norm_epsilon'], 'momentum': 1 - net['norm_momentum']}
    model, channels = nn.Sequential(), problem.preprocessing['channels']
    if net['stem_width']:
        model.add_module('stem_conv', nn.Conv2d(channels, net['stem_width'], *STEM))
        channels = net['stem_width']
    for i, width in enumerate(net['widths'], start=1):
        for j in (1, 2):
            model.add_module(f'block{i}_conv{j}', nn.Conv2d(channels, width, 3, j, padding=1))
            model.add_module(f'block{i}_relu{j}', nn.ReLU())
            model.add_module(f'block{i}_norm{j}', nn.BatchNorm2d(width, **norms))
            channels = width
        model.add_module(f'block{i}_drop', nn.Dropout(rate))
    pixels, hidden = problem.weights['head/dense1/kernel'].shape
    model.add_module('flatten', nn.Flatten())
    model.add_module('dense1', nn.Linear(pixels, hidden))
    model.add_module('relu1', nn.ReLU())
    model.add_module('norm1', nn.BatchNorm1d(hidden, **norms))
    model.add_module('drop1', nn.Dropout(head_rate))
    model.add_module('logits', nn.Linear(hidden, problem.classes))
    for name, kernel in kernels(problem).items():
        layer = model.get_submodule(name)
        nn.init.zeros_(layer.bias)
        layer.weight.data.copy_(mirrored(name, torch.from_numpy(kernel), channels))
    return model


def mirrored(name: str, kernel: torch.Tensor, channels: int) -> torch.Tensor:
    """A kernel as PyTorch orders it, for mirrored images with so many channels when flattened."""
    if kernel.ndim == 4:
        return kernel.permute(3, 2, 0, 1).flip(2, 3)
    if name != 'dense1':
        return kernel.T
    side = round((len(kernel) / channels) ** 0.5)
    return kernel.view(side, side, channels, -1).permute(3, 2, 0, 1).flip(2, 3).flatten(1)


def images(problem: Problem, layout: torch.memory_format) -> list[torch.Tensor]:
    """The mirrored batches, [b, c, h, w]; pixels that the stem never sees are left out."""
    x = torch.from_numpy(prepared(problem)).permute(0, 1, 4, 2, 3).flip(3, 4)
    if problem.config['model']['stem_width']:
        size, stride = STEM
        top, left = ((n - size) % stride for n in x.shape[3:])
        x = x[..., top:, left:]
    return [batch.contiguous(memory_format=layout) for batch in x]


def start(
    problem: Problem, layout: torch.memory_format = torch.contiguous_format, compiled: bool = False
) -> Contender:
    """The problem's training step.

    Args:
        problem: Of square images.
        layout: Of images and kernels.
        compiled: Whether `torch.compile` is used.
    """
    settings, l2 = problem.config['optimizer'], problem.config['loss']['l2']
    labels = torch.from_numpy(problem.labels).long()
    batches = list(zip(images(problem, layout), labels))

    def made(*, dropout: bool):
        model = network(problem, dropout=dropout).to(memory_format=layout)
        penalized = [layer.weight for layer in model if isinstance(layer, nn.Conv2d)]
        others = [p for p in model.parameters() if all(p is not each for each in penalized)]
        # PyTorch's way to have λΣw²: its gradient is added in the fused update.
        groups = [{'params': penalized, 'weight_decay': 2 * l2}, {'params': others}]
        optimizer = torch.optim.Adam(
            groups, settings['learning_rate'], eps=settings['epsilon'], fused=True
        )
        return torch.compile(model) if compiled else model, optimizer, penalized

    def step(model, optimizer, x, y):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def losses(count: int) -> list[float]:
        model, optimizer, penalized = made(dropout=False)
        found = []
        for batch in itertools.islice(itertools.cycle(batches), count):
            penalty = l2 * sum(float(kernel.detach().square().sum()) for kernel in penalized)
            found.append(step(model, optimizer, *batch).item() + penalty)
        return found

    model, optimizer, _ = made(dropout=True)
    endless = itertools.cycle(batches)

    def run(count: int) -> None:
        for batch in itertools.islice(endless, count):
            step(model, optimizer, *batch)

    return Contender(losses, run, f'torch {torch.__version__}')


def channels_last(problem: Problem) -> Contender:
    """The same with channels on the minor axis."""
    return start(problem, torch.channels_last)


def compiled(problem: Problem) -> Contender:
    """The same by `torch.compile`, which is faster so: 84 against 108 ms a step of strided96."""
    return start(problem, torch.channels_last, compiled=True)
