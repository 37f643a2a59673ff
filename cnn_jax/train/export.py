"""A trained network as files that need neither this package nor Flax: StableHLO and safetensors."""

import json
import os
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.errors import UserError
from cnn_jax.losses import log_probabilities
from cnn_jax.train.restore import Run

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export(run: Run, folder: Path) -> None:
    """Write the network of a run to a new folder, which appears whole.

    model.stablehlo       the function (weights, uint8 images [b, H, W, C]) → float32 [b, classes]
                          of class probabilities, for any batch size, on `PLATFORMS`
    weights.safetensors   its first argument, `{path: array}`
    classes.json          class names, image shape, resizing
    README.md             how to use them with jax, safetensors and NumPy alone

    Args:
        run: An opened run.
        folder: Must not exist, or be empty.

    Errors:
        UserError: The folder has something in it, or cannot be written.
    """
    from jax import export as jax_export
    from safetensors.numpy import save

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} is there already and not empty; choose another --out')
    weights = flat_variables(run.variables)
    (batch,) = jax_export.symbolic_shape('b')
    images = jax.ShapeDtypeStruct((batch, *run.task.image_shape), jnp.uint8)
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    exported = jax_export.export(jax.jit(_function(run)), platforms=PLATFORMS)(shapes, images)
    files = {
        'model.stablehlo': exported.serialize(),
        'weights.safetensors': save(weights),
        'classes.json': (json.dumps(_facts(run), indent=2) + '\n').encode(),
        'README.md': _readme(run).encode(),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as place:
            inside = Path(place) / 'export'
            inside.mkdir()
            for name, content in files.items():
                (inside / name).write_bytes(content)
            os.replace(inside, folder)
    except OSError as error:
        raise UserError(
            f'{folder} cannot be written ({error.strerror}); choose another --out'
        ) from error


def flat_variables(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Parameters and batch statistics as `{'params/…': array, 'batch_stats/…': array}`."""
    return {path: np.asarray(leaf) for path, leaf in params.flatten(variables).items()}


def _function(run: Run):
    def probabilities(weights, images):
        variables = params.unflatten(weights)
        logits: Any = run.model.apply(variables, run.task.prepare(images), train=False)
        return jnp.exp(log_probabilities(logits))

    return probabilities


def _facts(run: Run) -> dict[str, Any]:
    data = run.manifest['data']
    return {
        'classes': data['class_names'],
        'image_shape': data['image_shape'],
        'resize': run.config.data.resize,
        'preprocessing': data['preprocessing'],
        'step': run.step,
        'config_hash': cfg.content_hash(run.config),
        'platforms': PLATFORMS,
    }


def _readme(run: Run) -> str:
    height, width, channels = run.task.image_shape
    data = run.manifest['data']
    resizing = {
        'none': f'must be {width}×{height} pixels',
        'stretch': f'are stretched to {width}×{height} pixels (bilinear)',
        'crop': f'are scaled by their short side, then cropped at the centre to {width}×{height}',
    }[run.config.data.resize]
    licence = data['preprocessing'].get('licence')
    return _README.substitute(
        classes=', '.join(data['class_names']),
        source=data['source'],
        step=run.step,
        resizing=resizing,
        mode='L' if channels == 1 else 'RGB',
        size=f'({width}, {height})',
        shape=f'{height}, {width}, {channels}',
        licence=f'\n{licence}\n' if licence else '',
    )


_README = Template("""# An image classifier

Classes: $classes. Trained on `$source`, $step steps. Images $resizing; preprocessing is
inside the function.

| file | |
|---|---|
| `model.stablehlo` | the function, serialized by `jax.export`: (weights, images) → probabilities |
| `weights.safetensors` | its first argument |
| `classes.json` | class names, image shape, preprocessing |

It needs `pip install jax safetensors numpy pillow` and runs on CPU, NVIDIA GPU and TPU, for any
number of images at once:

```python
import json
import sys

import numpy as np
from jax import export
from PIL import Image
from safetensors.numpy import load_file

model = export.deserialize(open('model.stablehlo', 'rb').read())
weights = load_file('weights.safetensors')
classes = json.load(open('classes.json'))['classes']


def pixels(path):
    image = Image.open(path).convert('$mode').resize($size, Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape($shape)


images = np.stack([pixels(path) for path in sys.argv[1:]])
for path, row in zip(sys.argv[1:], np.asarray(model.call(weights, images))):
    print(path, classes[row.argmax()], row.max())
```
$licence""")
