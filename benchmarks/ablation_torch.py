"""The peer: a run of the ablation as a PyTorch user writes it. Started by `benchmarks.ablation`.

python -m benchmarks.ablation_torch DATA.npz --seed=0 --dropout=0.25 --norm=batch
"""

import json

import torch
from torch import nn

from benchmarks import ablation_peer as peer
from benchmarks.problem import read

# A little faster here than contiguous_format (NCHW): 16.4 processor seconds against 16.9.
LAYOUT = torch.channels_last


class Net(nn.Sequential):
    """Two pairs of convolutions, a hidden layer and the classifier."""

    def __init__(self, options):
        super().__init__()

        def add(name, layer):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
            self.add_module(name, layer)

        channels, momentum = 1, 1 - options.norm_momentum  # of the new average, here
        for i, width in enumerate((32, 64), start=1):
            for j in (1, 2):
                add(f'block{i}_conv{j}', nn.Conv2d(channels, width, 3, stride=j, padding=1))
                add(f'block{i}_relu{j}', nn.ReLU())
                if options.norm == 'batch':
                    add(f'block{i}_norm{j}', nn.BatchNorm2d(width, eps=1e-3, momentum=momentum))
                channels = width
            if options.dropout:
                add(f'block{i}_drop', nn.Dropout(options.dropout))
        add('flatten', nn.Flatten())
        add('dense1', nn.Linear(channels * 7 * 7, 128))
        add('relu1', nn.ReLU())
        if options.head_norm == 'batch':
            add('norm1', nn.BatchNorm1d(128, eps=1e-3, momentum=momentum))
        if options.head_dropout:
            add('drop1', nn.Dropout(options.head_dropout))
        add('logits', nn.Linear(128, peer.CLASSES))
        nn.init.xavier_uniform_(self.logits.weight)
        self.to(memory_format=LAYOUT)


def tensors(x, y):
    """Images as [n, c, h, w], and labels."""
    images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=LAYOUT)
    return images, torch.from_numpy(y).long()


def train_step(model, optimizer, images, labels, l2):
    """One update, and its loss."""
    loss = nn.functional.cross_entropy(model(images), labels)
    if l2:
        kernels = [layer.weight for layer in model if isinstance(layer, nn.Conv2d)]
        loss = loss + l2 * sum(kernel.square().sum() for kernel in kernels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.inference_mode()
def accuracy(model, x, y):
    model.eval()
    parts = peer.batches(x, y, peer.EVALUATION_BATCH)
    return sum(int((model(a).argmax(1) == b).sum()) for a, b in parts) / len(x)


def train(options):
    """The accuracies of both splits after the last epoch."""
    torch.manual_seed(options.seed)
    (x, y), test = (tensors(*split) for split in peer.images(options.data))
    model = Net(options)
    optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, eps=1e-7, fused=True)
    steps = options.epochs * len(x) // options.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(options.epochs):
        model.train()
        losses = []
        for index in torch.randperm(len(x)).split(options.batch):
            losses.append(train_step(model, optimizer, x[index], y[index], options.l2))
            schedule.step()
        loss = sum(losses) / len(losses)
        print(f'epoch {epoch + 1}: loss {loss:.4f}, test {accuracy(model, *test):.4f}')
    return {'train': accuracy(model, x, y), 'test': accuracy(model, *test)}


def first_losses(options):
    """The losses of a problem's batches from its weights, and what computed them.

    With a stride this network's padding=1 begins a pixel before the image where the others' SAME
    ends one after it. Mirrored images and kernels make the two the same.
    """
    problem = read(options.losses)
    x, y = tensors(*peer.images(options.data)[0])
    x, model = x.flip(2, 3), Net(options)
    with torch.no_grad():
        for path, value in problem.weights.items():
            *_, layer, name = path.split('/')
            if name != 'kernel':  # the others start at 0 or 1, here, too
                continue
            w = torch.from_numpy(value)
            if w.ndim == 4:
                w = w.permute(3, 2, 0, 1).flip(2, 3)
            elif layer == 'dense1':  # its input is flattened from h, w, c there
                w = w.view(7, 7, -1, 128).permute(3, 2, 0, 1).flip(2, 3).flatten(1)
            else:
                w = w.T
            model.get_submodule(layer).weight.copy_(w)
    optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, eps=1e-7, fused=True)
    batches = peer.batches(x, y, options.batch) * 2
    losses = [train_step(model, optimizer, *batch, options.l2) for batch in batches]
    return {'losses': losses, 'version': f'torch {torch.__version__}'}


if __name__ == '__main__':
    options = peer.options()
    print(json.dumps(first_losses(options) if options.losses else train(options)))
