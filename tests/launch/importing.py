"""Importing launchers beside one another."""

import importlib
from types import ModuleType

from absl import flags


def imported(name: str) -> ModuleType:
    """A launcher's module, without its flags: two launchers may have one of the same name."""
    before = set(flags.FLAGS)
    module = importlib.import_module(f'launch.{name}')
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
    return module
