"""The peer: the same fine-tuning as a PyTorch user writes it. Run by `benchmarks.finetune`.

  python -m benchmarks.torch_finetune PHOTOS WEIGHTS.npz [--cached]

With --cached the features are computed once by hand.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.problem import Problem, backbone_weights, caffe, prepared
from benchmarks.torch_features import backbone
from benchmarks.worker import Contender

LAYOUT, BATCH, EPOCHS = torch.channels_last, 32, 10


def images(folder):
    """Prepared images [n, 3, 224, 224] and labels."""
    paths = sorted(Path(folder).glob('*/*'))
    names = sorted({path.parent.name for path in paths})
    pixels = np.stack([np.asarray(Image.open(path).convert('RGB')) for path in paths])
    labels = torch.tensor([float(names.index(path.parent.name)) for path in paths])
    return tensor(caffe(pixels.astype(np.float32))), labels


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
    (x, y), (test_x, test_y) = (images(Path(photos) / split) for split in ('train', 'test'))
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


def start(problem: Problem) -> Contender:
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
