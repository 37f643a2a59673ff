"""The peer: a step, features and a fine-tuning as a PyTorch user writes them.

With a stride, padding=1 begins a pixel before the image where SAME ends one after it. Mirrored
images and kernels make the two the same, and PyTorch keeps the padding that costs it nothing.

`benchmarks.finetune` runs the fine-tuning as a script, with --cached on features that are computed
once by hand:

  python -m benchmarks.torch_peer PHOTOS WEIGHTS.npz [--cached]
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.problem import VGG16, Problem, backbone_weights, kernels, photographs, prepared
from benchmarks.worker import Contender, forward

STEM = 7, 2  # kernel and stride
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


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
    return [batch.contiguous(memory_format=layout).to(DEVICE) for batch in x]


def precision(problem: Problem) -> Callable[[], torch.autocast]:
    """The context of a problem's matrix products: bfloat16 if it says so, float32's as JAX's."""
    torch.set_float32_matmul_precision('high')  # TF32 where there is a GPU
    bfloat16 = problem.config['model']['dtype'] == 'bfloat16'
    return functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=bfloat16)


def start(
    problem: Problem, layout: torch.memory_format = torch.contiguous_format, compiled: bool = False
) -> Contender:
    """The problem's training step, of square images; images and kernels have the layout."""
    settings, l2 = problem.config['optimizer'], problem.config['loss']['l2']
    labels = torch.from_numpy(problem.labels).long().to(DEVICE)
    batches = list(zip(images(problem, layout), labels))
    narrow = precision(problem)

    def made(*, dropout: bool):
        model = network(problem, dropout=dropout).to(DEVICE, memory_format=layout)
        penalized = [layer.weight for layer in model if isinstance(layer, nn.Conv2d)]
        others = [p for p in model.parameters() if all(p is not each for each in penalized)]
        # PyTorch's way to have λΣw²: its gradient is added in the fused update.
        groups = [{'params': penalized, 'weight_decay': 2 * l2}, {'params': others}]
        optimizer = torch.optim.Adam(
            groups, settings['learning_rate'], eps=settings['epsilon'], fused=True
        )
        return torch.compile(model) if compiled else model, optimizer, penalized

    def step(model, optimizer, x, y):
        with narrow():
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
        if DEVICE == 'cuda':
            torch.cuda.synchronize()

    return Contender(losses, run, f'torch {torch.__version__}')


channels_last = functools.partial(start, layout=torch.channels_last)
# `torch.compile` is faster so: 84 against 108 ms a step of strided96.
compiled = functools.partial(start, layout=torch.channels_last, compiled=True)


def backbone(weights: dict[str, np.ndarray]) -> nn.Sequential:
    """torchvision's `vgg16().features`, frozen, with weights `block1_conv1/kernel` and so on."""
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


def features(
    problem: Problem, layout: torch.memory_format = torch.contiguous_format, compiled: bool = False
) -> Contender:
    """Prepared images in, features out; images and weights have the layout."""
    model = backbone(backbone_weights(problem)).to(DEVICE, memory_format=layout)
    narrow = precision(problem)
    if compiled:
        model = torch.compile(model)

    @torch.inference_mode()
    def computed(x: torch.Tensor) -> np.ndarray:
        with narrow():
            return model(x.to(DEVICE)).permute(0, 2, 3, 1).float().cpu().numpy()

    batches = torch.from_numpy(prepared(problem)).permute(0, 1, 4, 2, 3)
    batches = [batch.contiguous(memory_format=layout) for batch in batches]
    return forward(computed, batches, f'torch {torch.__version__}')


features_channels_last = functools.partial(features, layout=torch.channels_last)
# Its user sets TORCHINDUCTOR_FREEZING.
features_compiled = functools.partial(features, layout=torch.channels_last, compiled=True)


LAYOUT, BATCH, EPOCHS = torch.channels_last, 32, 10


def tensor(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=LAYOUT)


def new_head(dropout=0.5):
    """What is trained."""
    head = nn.Sequential(
        nn.Flatten(), nn.Linear(25088, 1024), nn.ReLU(), nn.Dropout(dropout), nn.Linear(1024, 1)
    )
    nn.init.kaiming_normal_(head[1].weight)
    return head


def train_step(base, head, optimizer, x, y):
    """One update of the head, and its loss."""
    with torch.no_grad():
        x = base(x)
    loss = nn.functional.binary_cross_entropy_with_logits(head(x).squeeze(1), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def optimizer_of(head):
    return torch.optim.SGD(head.parameters(), 1e-3, momentum=0.9, fused=True)


@torch.inference_mode()
def batchwise(function, x):
    return torch.cat([function(part) for part in x.split(BATCH)])


def main():
    photos, weights, *options = sys.argv[1:]
    splits = (photographs(Path(photos) / split) for split in ('train', 'test'))
    (x, y), (test_x, test_y) = ((tensor(x), torch.from_numpy(y)) for x, y in splits)
    with np.load(weights) as given:
        base = backbone(given).to(memory_format=LAYOUT)
    if '--cached' in options:
        x, test_x = (batchwise(base, each).clone() for each in (x, test_x))
        base = nn.Identity()
    head = new_head()
    optimizer, ends = optimizer_of(head), [time.perf_counter()]
    for _ in range(EPOCHS):
        head.train()
        for index in torch.randperm(len(x)).split(BATCH):
            train_step(base, head, optimizer, x[index], y[index])
        head.eval()
        found = batchwise(lambda part: head(base(part)).squeeze(1) > 0, test_x)
        ends.append(time.perf_counter())
    print(np.median(np.diff(ends)[1:]), float((found == test_y).float().mean()))


def finetune(problem: Problem) -> Contender:
    """For the gate: the problem's weights, head included, and no dropout."""
    base = backbone(backbone_weights(problem)).to(memory_format=LAYOUT)

    def losses(count: int) -> list[float]:
        head = new_head(dropout=0.0)
        for layer, name in (head[1], 'dense1'), (head[4], 'logits'):
            kernel = torch.from_numpy(problem.weights[f'head/{name}/kernel'])
            if name == 'dense1':  # its input is flattened from h, w, c there
                kernel = kernel.view(7, 7, 512, -1).permute(2, 0, 1, 3).flatten(0, 2)
            layer.weight.data = kernel.T.contiguous()
            layer.bias.data = torch.from_numpy(problem.weights[f'head/{name}/bias'])
        optimizer, x = optimizer_of(head), prepared(problem)
        each = [i % len(x) for i in range(count)]
        labels = torch.from_numpy(problem.labels).float()
        return [train_step(base, head, optimizer, tensor(x[i]), labels[i]) for i in each]

    return Contender(losses, lambda count: None, f'torch {torch.__version__}')


if __name__ == '__main__':
    main()
