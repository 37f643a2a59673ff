"""Export of a trained network to StableHLO and safetensors, usable without this package or Flax."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.errors import UserError
from cnn_jax.files import make_folder, read_text, sync, sync_all
from cnn_jax.regularizers import log_probabilities
from cnn_jax.train.run import Run

PLATFORMS = ('cpu', 'cuda', 'tpu')
METRICS = ('loss', 'accuracy', 'top5', 'calibration_error')


def export(run: Run, folder: Path) -> None:
    """Write the network of a run to a new folder, atomically.

    model.stablehlo       the function (weights, uint8 images [b, H, W, C]) → float32 [b, classes]
                          of class probabilities, for any batch size, on `PLATFORMS`
    weights.safetensors   its first argument, `{path: array}`
    classes.json          class names, image shape, resizing, preprocessing, metrics
    README.md             how to use them with jax, safetensors, NumPy and Pillow alone

    Averaged weights are exported where the run has any.

    Errors:
        UserError: The folder is not empty, or cannot be written.
    """
    from safetensors.numpy import save

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} exists and is not empty; choose another --out')
    weights = {path: np.asarray(leaf) for path, leaf in params.flatten(run.variables).items()}
    facts = _facts(run)
    origin = {'config_hash': facts['config_hash']}
    if licence := facts['preprocessing'].get('licence'):
        origin['licence'] = licence
    files = {
        'model.stablehlo': serialize(run),
        'weights.safetensors': save(weights, origin),
        'classes.json': (json.dumps(facts, indent=2) + '\n').encode(),
        'README.md': readme(facts).encode(),
    }
    partial = folder.with_name(f'.{folder.name}.partial')
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        make_folder(partial)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        sync_all(partial)
        os.replace(partial, folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f'{folder} cannot be written ({error.strerror}); choose another --out'
        ) from error


def serialize(run: Run) -> bytearray:
    """The function (flat variables, uint8 images) → class probabilities, by `jax.export`.

    The batch size is symbolic, and the weights are an argument, not constants of the program.
    """
    from jax import export as jax_export

    def probabilities(weights, images):
        variables = params.unflatten(weights)
        logits: Any = run.model.apply(variables, run.spec.prepare(images), train=False)
        return jnp.exp(log_probabilities(logits))

    (batch,) = jax_export.symbolic_shape('b')
    images = jax.ShapeDtypeStruct((batch, *run.spec.image_shape), jnp.uint8)
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in params.flatten(run.variables).items()
    }
    exported = jax_export.export(jax.jit(probabilities), platforms=PLATFORMS)(shapes, images)
    return exported.serialize()


def _facts(run: Run) -> dict[str, Any]:
    data = run.manifest['data']
    known = {name: run.metrics[name] for name in ('count', *METRICS) if name in run.metrics}
    return {
        'classes': data['class_names'],
        'image_shape': data['image_shape'],
        'resize': run.config.data.resize,
        'preprocessing': data['preprocessing'],
        'network': run.config.model.name,
        'source': data['source'],
        'training_images': data['train']['count'],
        'step': run.step,
        'evaluation': known or None,
        'config_hash': cfg.content_hash(run.config),
        'jax': importlib.metadata.version('jax'),
        'platforms': PLATFORMS,
    }


def readme(facts: dict[str, Any]) -> str:
    """The README of an export, from what `classes.json` holds.

    Its code reads a file as `cnn_jax.data.decode` does.
    """
    text = read_text(Path(__file__).with_suffix('.jinja'))
    template = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True)
    return template.render(facts, metrics=METRICS).rstrip() + '\n'
