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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnn_jax import nn as nn
    from cnn_jax.ablation.run import ablate as ablate
    from cnn_jax.config import (
        Augment,
        Config,
        Data,
        Features,
        Loss,
        Model,
        Optimizer,
        Train,
        Unfreeze,
        replace,
    )
    from cnn_jax.data.source import Source
    from cnn_jax.errors import RunFailed, UserError
    from cnn_jax.freezing import freeze
    from cnn_jax.regularizers import Regularizer
    from cnn_jax.tools.evaluate import evaluate
    from cnn_jax.train.fit import fit
    from cnn_jax.train.run import Run, load_run

__version__ = '0.2.0.dev0'

_MODULES = {
    'cnn_jax': ('nn',),
    'cnn_jax.ablation.run': ('ablate',),
    'cnn_jax.config': (
        *('Augment', 'Config', 'Data', 'Features', 'Loss', 'Model', 'Optimizer', 'Train'),
        *('Unfreeze', 'replace'),
    ),
    'cnn_jax.data.source': ('Source',),
    'cnn_jax.errors': ('RunFailed', 'UserError'),
    'cnn_jax.freezing': ('freeze',),
    'cnn_jax.regularizers': ('Regularizer',),
    'cnn_jax.tools.evaluate': ('evaluate',),
    'cnn_jax.train.fit': ('fit',),
    'cnn_jax.train.run': ('Run', 'load_run'),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_WITHOUT_JAX = ('cnn_jax.config', 'cnn_jax.errors')

__all__ = [
    'Augment',
    'Config',
    'Data',
    'Features',
    'Loss',
    'Model',
    'Optimizer',
    'Regularizer',
    'Run',
    'RunFailed',
    'Source',
    'Train',
    'Unfreeze',
    'UserError',
    'ablate',
    'evaluate',
    'fit',
    'freeze',
    'load_run',
    'nn',
    'replace',
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if _HOMES[name] not in _WITHOUT_JAX:
        from cnn_jax import runtime

        runtime.configure()  # before JAX is imported
    if name == 'nn':
        return importlib.import_module('cnn_jax.nn')
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
