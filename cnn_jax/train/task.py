"""What a run is about, and its phases: which parameters each trains, and how fast."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from cnn_jax import config as cfg
from cnn_jax import optim, params
from cnn_jax.errors import UserError


@dataclass(frozen=True)
class Task:
    """What the step needs to know about the data and the length of the run.

    `prepare` turns uint8 images into the floats that the network expects. `ends` are the steps
    after which each phase is over. `initial`, given the parameters' shapes, returns those that
    are not drawn (published weights).
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    prepare: Callable[[UInt8[Array, 'b h w c']], Float[Array, 'b h w d']]
    steps_per_epoch: float
    ends: tuple[int, ...]
    initial: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def due(self, step: int, epochs: float = 1.0) -> bool:
        """Whether a multiple of `epochs` (none for 0), or a phase, ends with this step."""
        if step in self.ends:
            return True
        every = epochs * self.steps_per_epoch
        return bool(every) and int(step / every) > int((step - 1) / every)


def phase_members(config: cfg.Config, names: list[str]) -> list[list[str]]:
    """The parameters that each phase trains for the first time.

    Errors:
        UserError: A pattern matches nothing, the first phase trains nothing, or the second
            freezes what the first trained.
    """
    first = params.trainable(names, config.train.frozen)
    if not config.unfreeze.epochs:
        return [first]
    frozen = params.select(names, config.unfreeze.frozen, field='unfreeze.frozen')
    if lost := sorted(set(first) & set(frozen)):
        raise UserError(
            f'config.unfreeze.frozen freezes {lost[0]}, which the first phase trains; '
            'a second phase only trains more'
        )
    return [first, [name for name in names if name not in {*first, *frozen}]]


def update_groups(config: cfg.Config, task: Task, members: list[list[str]]) -> list[optim.Group]:
    """One group a phase: the second has a schedule of its own and rates that fall with depth.

    rate(w) = unfreeze.learning_rate · schedule · unfreeze.depth_decay^(depth(w) − 1), with depth 1
    for the block next to the head (discriminative fine-tuning, Howard & Ruder 2018).
    """
    last, per_epoch = task.ends[-1], task.steps_per_epoch
    groups = [optim.Group(members[0], optim.schedule(config.optimizer, per_epoch, last))]
    if len(members) > 1:
        slow = dataclasses.replace(config.optimizer, learning_rate=config.unfreeze.learning_rate)
        rate = optim.schedule(slow, per_epoch, last - task.ends[0])
        depths = params.depths(members[0] + members[1])
        decay = jnp.asarray(config.unfreeze.depth_decay, jnp.float32)
        scales = {name: decay ** max(depths[name] - 1, 0) for name in members[1]}
        groups.append(optim.Group(members[1], rate, scales))
    return groups


def acted_on(
    names: list[str],
    ever: set[str],
    trainable: list[str],
    patterns: Sequence[str],
    strength: float,
    field: str,
) -> list[str]:
    """The paths that something acts on, among those that a phase trains.

    They do not depend on the strength: a compiled step serves every one, 0 included.

    Args:
        names: All paths.
        ever: Those that any phase trains.
        trainable: Those that this phase does.
        patterns, field: What it acts on, and where the config says so.
        strength: With 0 the patterns need not make sense.

    Errors:
        UserError: A pattern matches nothing, or all of them nothing that is ever trained.
    """
    if strength:
        matched = params.select(names, patterns, field=field)
        if not ever.intersection(matched):
            raise UserError(
                f'config.{field} is {tuple(patterns)}, which matches frozen parameters alone, so '
                'that it would change nothing; name some that are trained'
            )
    return [name for name in trainable if params.matches(name, patterns)]


def penalized_by(
    loss: cfg.Loss, names: list[str], ever: set[str], trainable: list[str]
) -> dict[str, list[str]]:
    """The paths of each penalty in a phase, by its field in `config.loss`; see `acted_on`."""
    return {
        kind: acted_on(
            names, ever, trainable, getattr(loss, f'{kind}_on'), strength, f'loss.{kind}_on'
        )
        for kind, strength in (
            ('l2', loss.l2),
            ('l1', loss.l1),
            ('orthogonality', loss.orthogonality),
            ('l2_sp', loss.l2_sp),
        )
    }
