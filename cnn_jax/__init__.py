"""Ablations of CNN regularizers, and transfer from a frozen VGG16, in JAX and Flax Linen.

  import cnn_jax as cj

  run = cj.fit(cj.Config(train=cj.Train(epochs=5)), 'runs/first')
  run.metrics, run.curves, run.predict(images)
  run = cj.load_run('runs/first')

  result = cj.ablate({'dropout': {'model.dropout': 0.25}}, baseline=config, workdir='runs/ablation')
  result.verdicts, result.table, result.plot()

  tx = cj.freeze(optax.adam(1e-3), 'backbone/*')
  from cnn_jax.nn import BatchNorm, Conv, Dropout  # for Flax modules of your own

Importing the package loads neither JAX nor a device; the first use of a name does the former, with
the XLA settings that this package computes right with.
"""

import importlib
from typing import Any

__version__ = '0.2.0.dev0'

_HOMES = {
    'fit': 'cnn_jax.train.run',
    'load_run': 'cnn_jax.train.run',
    'Run': 'cnn_jax.train.run',
    'ablate': 'cnn_jax.ablation.run',
    'evaluate': 'cnn_jax.tools.evaluate',
    'freeze': 'cnn_jax.freezing',
    'Regularizer': 'cnn_jax.regularizers',
    'Source': 'cnn_jax.data.source',
    'UserError': 'cnn_jax.errors',
    'RunFailed': 'cnn_jax.errors',
    **dict.fromkeys(
        (
            'Config',
            'Model',
            'Data',
            'Augment',
            'Loss',
            'Optimizer',
            'Train',
            'Unfreeze',
            'Features',
        ),
        'cnn_jax.config',
    ),
}
_WITHOUT_JAX = ('cnn_jax.config', 'cnn_jax.errors')

__all__ = [*_HOMES, 'nn']


def __getattr__(name: str) -> Any:
    if name != 'nn' and name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if _HOMES.get(name) not in _WITHOUT_JAX:
        from cnn_jax import runtime

        runtime.configure()  # before JAX is imported
    if name == 'nn':
        return importlib.import_module('cnn_jax.nn')
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
