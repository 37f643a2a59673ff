"""Export of a trained network as StableHLO or ONNX, usable without this package or Flax."""

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jinja2
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.errors import UserError, printable
from cnn_jax.files import make_folder, read_text, sync, sync_all
from cnn_jax.freezing import mode_arguments
from cnn_jax.nn.cpu import compiling_for
from cnn_jax.regularizers import log_probabilities
from cnn_jax.train.run import Run

PLATFORMS = ('cpu', 'cuda', 'tpu')
OPSET = 18  # what runtimes of 2023 and later read
MOST_OF_ONNX = 2e9  # bytes of weights: a protocol buffer holds 2³¹
METRICS = ('loss', 'accuracy', 'top5', 'calibration_error')


def export(run: Run, folder: Path, form: str = 'stablehlo') -> None:
    """Write the network of a run to a new folder, atomically, as `stablehlo` or `onnx`.

    model.stablehlo       the function (weights, uint8 images [b, H, W, C]) → float32 [b, classes]
                          of class probabilities, for any batch size, on `PLATFORMS`
    weights.safetensors   its first argument, `{path: array}`
    model.onnx            in place of both: the function of the images, the weights inside
    classes.json          class names, image shape, resizing, preprocessing, metrics
    README.md             how to use them with jax and safetensors, or onnxruntime, and with NumPy
                          and Pillow alone

    Averaged weights are exported where the run has any.

    Errors:
        UserError: The folder is not empty, or cannot be written; as ONNX also: `jax2onnx` is not
            installed, or does not convert this network.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} exists and is not empty; choose another --out')
    facts = _facts(run)
    origin = {'config_hash': facts['config_hash']}
    if licence := facts['preprocessing'].get('licence'):
        origin['licence'] = licence
    written, of_form = {'stablehlo': _as_stablehlo, 'onnx': _as_onnx}[form](run, origin)
    facts |= {'format': form, **of_form}
    files = written | {
        'classes.json': (json.dumps(facts, indent=2) + '\n').encode(),
        'README.md': readme(facts).encode(),
    }
    folder = folder.absolute()
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


def _as_stablehlo(run: Run, origin: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The files of a StableHLO export, and the facts of this format."""
    from safetensors.numpy import save

    weights = {path: np.asarray(leaf) for path, leaf in params.flatten(run.variables).items()}
    files = {'model.stablehlo': serialize(run), 'weights.safetensors': save(weights, origin)}
    return files, {'platforms': PLATFORMS}


def serialize(run: Run) -> bytearray:
    """The function (flat variables, uint8 images) → class probabilities, by `jax.export`.

    The batch size is symbolic, and the weights are an argument, not constants of the program.
    """
    from jax import export as jax_export

    function = _probabilities(run, run.config)
    (batch,) = jax_export.symbolic_shape('b')
    images = jax.ShapeDtypeStruct((batch, *run.spec.image_shape), jnp.uint8)
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in params.flatten(run.variables).items()
    }
    exported = jax_export.export(jax.jit(function), platforms=PLATFORMS)(shapes, images)
    return exported.serialize()


def _probabilities(run: Run, config: cfg.Config) -> Callable:
    """The function (flat variables, uint8 images) → float32 class probabilities."""
    network = run.spec.network(config)
    mode: dict[str, Any] = mode_arguments(network, train=False)

    def probabilities(weights, images):
        variables = params.unflatten(weights)
        with nn.intercept_methods(run.program.evaluating):
            logits: Any = network.apply(variables, run.spec.prepare(images), **mode)
        return jnp.exp(log_probabilities(logits))

    return probabilities


def _as_onnx(run: Run, origin: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The file of an ONNX export, and the facts of this format.

    It computes in float32: ONNX Runtime has no convolution of bfloat16 on a CPU. What it computes
    is compared with JAX before it is written.
    """
    weights = params.flatten(run.variables)
    if (nbytes := sum(leaf.nbytes for leaf in weights.values())) > MOST_OF_ONNX:
        raise UserError(
            f'the weights take {nbytes / 1e9:.1f} GB and a file of ONNX holds 2; '
            'export to --format=stablehlo'
        )
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime
    except ImportError as error:
        raise UserError(
            'ONNX takes jax2onnx, in an environment of its own: python3 -m venv .onnx; '
            '.onnx/bin/pip install -r requirements-onnx.txt; then .onnx/bin/python in the place '
            'of python'
        ) from error
    import onnx.helper

    function = functools.partial(
        _probabilities(run, cfg.replace(run.config, {'model.dtype': 'float32'})), weights
    )
    images = np.random.default_rng(0).integers(0, 256, (2, *run.spec.image_shape), np.uint8)
    expected = jax.jit(function)(images)
    logging.getLogger('onnx_ir').setLevel(logging.ERROR)  # it warns of shapes that it leaves out
    try:
        with compiling_for('onnx'):  # in operations of JAX alone
            model: Any = jax2onnx.to_onnx(
                function,
                [jax.ShapeDtypeStruct(('b', *run.spec.image_shape), np.uint8)],
                model_name=run.config.model.name,
                opset=OPSET,
                input_names=['images'],
                output_names=['probabilities'],
            )
        onnx.helper.set_model_props(model, origin)
        content = model.SerializeToString()
        got: Any = onnxruntime.InferenceSession(content).run(None, {'images': images})
        np.testing.assert_allclose(got[0], expected, rtol=1e-3, atol=1e-4)
    except Exception as error:  # of any kind, as the network may be anyone's
        raise UserError(
            f'jax2onnx does not convert this network ({type(error).__name__}: '
            f'{printable(" ".join(str(error).split()))[:300]}); export to --format=stablehlo'
        ) from error
    return {'model.onnx': content}, {'opset': OPSET, 'jax2onnx': version('jax2onnx')}


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
        'jax': version('jax'),
    }


def readme(facts: dict[str, Any]) -> str:
    """The README of an export, from what `classes.json` holds.

    Its code reads a file as `cnn_jax.data.decode` does.
    """
    text = read_text(Path(__file__).with_suffix('.jinja'))
    template = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True)
    return template.render(facts, metrics=METRICS).rstrip() + '\n'
