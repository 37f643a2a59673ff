"""Opening an ablation in a process that runs cells: its data and its ledger."""

import dataclasses
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.ablation.ledger import Ledger, open_ledger
from cnn_jax.ablation.plan import Plan, budget, code_digest
from cnn_jax.errors import UserError
from cnn_jax.train import manifest, setup


def open_ablation(
    folder: Path, plan: Plan, settings: runtime.Settings, command: str
) -> tuple[Ledger, tuple[dict[str, Any], Any, Any]]:
    """The ledger in a work directory and what `runner.run_cells` needs of the data.

    Args:
        folder: The work directory.
        plan: What is compared.
        settings: Of this process.
        command: What the user typed, for the report.

    Returns:
        The ledger; the data's description, the training and the evaluation batches.

    Errors:
        UserError: Arms differ in their data, the data cannot be had, or the folder holds an
            ablation with other configs, data or code.
    """
    first = plan.configs[plan.baseline]
    for arm, config in plan.configs.items():
        if dataclasses.replace(config.data, batch=first.data.batch) != first.data:
            raise UserError(
                f'arm {arm!r} changes config.data; all arms must see the same images, and only '
                'config.data.batch may differ'
            )
    train, evaluation, description, _ = setup.open_data(first)
    identity = {
        'code': code_digest(),
        'training data': description['train']['fingerprint'],
        'evaluation data': description['eval']['fingerprint'],
        'jaxlib': runtime.jaxlib_version(),
        'devices': runtime.devices(),
        'XLA_FLAGS': settings.xla_flags,
    }
    machine = runtime.machine(settings)
    facts = {
        'command': command,
        'manifest': manifest.manifest(cfg.content_hash(first), machine, description),
        'budgets': {arm: budget(config, train.n) for arm, config in plan.configs.items()},
    }
    return open_ledger(folder, plan, identity, facts), (description, train, evaluation)
