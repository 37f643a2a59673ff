"""The static side of a run: its specification, and what is worked out once for each phase.

A `Program` is everything that the compiled functions of `train.step` take as given: which
parameters are trained, what acts on which, how the network is called. It also makes the state.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jaxtyping import Array, Float, Int, UInt8

from cnn_jax import config as cfg
from cnn_jax import freezing, optim, params, rng, runtime
from cnn_jax.components import blamed_on
from cnn_jax.errors import UserError
from cnn_jax.models import build
from cnn_jax.regularizers import REGULARIZERS, Regularizer

Values = dict[str, Any]  # dotted config path -> number, and 'seed'


@flax.struct.dataclass
class State:
    """Everything that changes in a run.

    `opt_state`, `averaged` and `init_params` have leaves for trained parameters only; {} stands
    for what a run does not use.
    """

    step: Int[Array, '']  # updates done
    params: dict[str, Any]  # all, as Flax nests them
    batch_stats: dict[str, Any]  # running statistics of batch normalization as training has them
    opt_state: Any  # of `optim.make_optimizer`
    averaged: dict[str, Array]  # averaged weights by path
    # Weights that L2-SP pulls toward, by path; statistics of the evaluated weights.
    init_params: dict[str, Array] = flax.struct.field(default_factory=dict)
    eval_batch_stats: dict[str, Any] = flax.struct.field(default_factory=dict)

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The network's variables in inference: averaged weights, if any, and their statistics."""
        weights = params.flatten(self.params) | self.averaged
        return {
            'params': params.unflatten(weights),
            'batch_stats': self.eval_batch_stats or self.batch_stats,
        }

    @property
    def backbone(self) -> dict[str, Any]:
        """The variables of the module `backbone`, where they are frozen."""
        variables = {'params': self.params, 'batch_stats': self.batch_stats}
        parts = {kind: tree.get('backbone') for kind, tree in variables.items()}
        return {kind: {'backbone': tree} for kind, tree in parts.items() if tree}


@dataclass(frozen=True)
class RunSpec:
    """Everything that a step must know of the data, the run's length, and what the user brings."""

    image_shape: tuple[int, int, int]  # height, width and channels, in uint8
    num_classes: int
    prepare: Callable[[UInt8[Array, 'b h w c']], Float[Array, 'b h w d']]  # for the network
    steps_per_epoch: float  # need not be whole
    phase_ends: tuple[int, ...]  # the step after which each phase is over
    # From the shapes of the variables to those that are not drawn.
    pretrained: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    class_weights: tuple[float, ...] = ()  # of the classes in the loss; (): all alike
    # In the place of what the config names, and more.
    model: Callable[[cfg.Config, int], nn.Module] | None = None
    optimizer: Callable[[cfg.Config], optax.GradientTransformation] | None = None
    regularizers: tuple[Regularizer, ...] = ()

    def is_boundary(self, step: int, epochs: float = 1.0) -> bool:
        """Return whether a multiple of `epochs` (none for 0), or a phase, ends with this step."""
        if step in self.phase_ends:
            return True
        every = max(epochs * self.steps_per_epoch, 1.0)
        return bool(epochs) and int(step / every) > int((step - 1) / every)

    def network(self, config: cfg.Config) -> nn.Module:
        """The network of a config, whose numbers may be traced."""
        if self.model:
            return self.model(config, self.num_classes)
        return build(config.model, self.num_classes)


@dataclass(frozen=True)
class Program:
    """Everything static about the steps of one phase of a run."""

    config: cfg.Config  # of its traced fields only whether the optional ones are on
    spec: RunSpec  # the rest of the run
    phase: int  # 0, or 1 for the one that `config.unfreeze` describes
    cached: str  # the layer whose cached output batches hold in place of images, or ''
    shapes: dict[str, Any]  # of the parameters
    statistics: dict[str, Any]  # shapes of the batch statistics
    members: tuple[tuple[str, ...], ...]  # what each phase up to this one trains for the first time
    acted_on: dict[str, list[str]]  # trained parameters by the patterned field, e.g. `loss.l2_on`
    regularizers: tuple[Regularizer, ...]  # those that are on

    @functools.cached_property
    def trainable(self) -> list[str]:
        """Paths of the parameters that this phase trains."""
        return sorted(path for member in self.members for path in member)

    @property
    def frozen_patterns(self) -> tuple[str, ...]:
        return (self.config.train.frozen, self.config.unfreeze.frozen)[self.phase]

    @property
    def averages(self) -> bool:
        """True if the evaluated weights are an average."""
        return bool(self.config.train.ema or self.config.train.swa_from)

    @property
    def entry(self) -> dict[str, Any]:
        """The arguments with which the network takes what batches hold."""
        return {'method': 'classify', 'after': self.cached} if self.cached else {}

    @property
    def interceptor(self) -> Callable:
        """Holds frozen modules in inference."""
        names = params.flatten(self.shapes)
        return freezing.in_inference(names, self.trainable, self.frozen_patterns)

    @property
    def evaluating(self) -> Callable:
        """Holds all modules of an own network in inference, whatever it calls their mode by."""
        names = params.flatten(self.shapes) if self.spec.model else ()
        return freezing.in_inference(names, (), ('*',) if self.spec.model else ())

    def forward(
        self, config: cfg.Config, variables: dict[str, Any], images: Array, key: Array
    ) -> tuple[Array, dict[str, Any], params.Flat]:
        """A pass of the network in training over prepared images, frozen modules in inference.

        Returns:
            Logits; the new batch statistics; the outputs of the layers that a regularizer looks
            at, by path one for each call.
        """
        watching = [each.on for each in self.regularizers if each.needs_activations]
        watched = {path for on in watching for path in self.acted_on.get(on, [])}

        def capture(module: nn.Module, method: str) -> bool:
            return method == '__call__' and '/'.join(module.path) in watched

        net = self.spec.network(config)
        mode: dict[str, Any] = freezing.mode_arguments(net, train=True)
        with nn.intercept_methods(self.interceptor):
            applied: Any = net.apply(
                variables,
                images,
                **mode,
                rngs={'dropout': key},
                mutable=['batch_stats', 'intermediates'] if watched else ['batch_stats'],
                capture_intermediates=capture if watched else False,
                **self.entry,
            )
        logits, updated = applied
        activations = params.flatten(updated.get('intermediates', {}))
        outputs = {path.removesuffix('/__call__'): calls for path, calls in activations.items()}
        return logits, updated.get('batch_stats', variables['batch_stats']), outputs

    def optimizer(self, config: cfg.Config, phases: int | None = None):
        """The optimizer with a config's numbers, for the first `phases` phases (default: all)."""
        groups = update_groups(config, self.spec, self.members[:phases])
        frozen = params.flatten(self.shapes).keys() - {p for group in groups for p in group.paths}
        decayed = self.acted_on['optimizer.decay_on']
        own = self.spec.optimizer(config) if self.spec.optimizer else None
        return optim.make_optimizer(config.optimizer, groups, frozen, decayed, own)


def traced_values(config: cfg.Config) -> Values:
    """The arguments of the compiled steps: every traced field, and the seed."""
    return {**cfg.traced_values(config), 'seed': np.uint32(config.seed)}


def make_program(config: cfg.Config, spec: RunSpec, phase: int = 0) -> Program:
    """Work out everything static about one phase of a run on images, and check it.

    Errors:
        UserError: A pattern matches nothing, the images are too small for the net, a frozen module
            cannot be held in inference, or a regularizer would change nothing.
    """
    own_model = 'your own model' if spec.model else None
    with blamed_on(own_model):
        shapes = jax.eval_shape(functools.partial(_draw, config, spec), 0)
    if unknown := set(shapes) - {'params', 'batch_stats'}:
        raise UserError(
            f'the network keeps variables in {", ".join(sorted(unknown))}; only params and '
            'batch_stats can be trained and saved here'
        )
    weights, statistics = shapes.get('params', {}), shapes.get('batch_stats', {})
    for path, leaf in params.flatten(weights).items():
        if not hasattr(leaf, 'shape'):
            raise UserError(
                f'the parameter {path} of the network is a {type(leaf).__name__}; parameters are '
                'arrays here: give each a name of its own'
            )
        if not leaf.size or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(
                f'the parameter {path} of the network is {leaf.dtype} {list(leaf.shape)}; '
                'parameters are real numbers, at least one'
            )
    names = list(params.flatten(weights))
    by_phase = trainable_by_phase(config, names)
    members = tuple(tuple(member) for member in by_phase[: phase + 1])
    depths = params.depths(names)
    shallow = len(by_phase) > 1 and all(depths[name] <= 1 for name in by_phase[-1])
    if shallow and config.unfreeze.depth_decay != 1:
        raise UserError(
            f'config.unfreeze.depth_decay is {config.unfreeze.depth_decay:g}, but the second phase '
            'trains nothing more than one block (blockN) from the head, so that it would change '
            'nothing; leave it at 1'
        )
    ever = {name for member in by_phase for name in member}
    known = (*REGULARIZERS, *spec.regularizers)
    on = tuple(r for r in known if r.is_on(config))
    program = Program(config, spec, phase, '', weights, statistics, members, {}, on)
    strengths = {r.on: cfg.get(config, r.field) for r in known if r.on and not r.needs_activations}
    strengths['optimizer.decay_on'] = config.optimizer.weight_decay
    strengths['optimizer.max_norm_on'] = config.optimizer.max_norm
    acted_on = {}
    for field, strength in strengths.items():
        patterns: Sequence[str] = cfg.get(config, field)
        matched = params.select(names, patterns, field=f'config.{field}') if strength else ever
        if not patterns and strength:
            raise UserError(
                f'config.{field} is empty, so that what it is for would change nothing; name some '
                "parameters, ('*/kernel',) say"
            )
        if not ever.intersection(matched):
            raise UserError(
                f'config.{field} is {tuple(patterns)}, which matches frozen parameters alone, so '
                'that it would change nothing; name some that are trained'
            )
        # Whatever the strength: a compiled step serves every one, 0 included.
        acted_on[field] = [name for name in program.trainable if params.matches(name, patterns)]
    watching = [r.on for r in on if r.needs_activations]
    frozen = freezing.frozen_modules(names, program.trainable, program.frozen_patterns)
    held = [path for path in params.flatten(statistics) if frozen(path.rpartition('/')[0])]
    if watching or spec.model or held:
        with blamed_on(own_model):
            layers = _checked_layers(program, frozen)
            _check_inference(program)
        acted_on |= {field: _select_layers(program, layers, field) for field in watching}
    program = dataclasses.replace(program, acted_on=acted_on)
    if spec.optimizer:
        with blamed_on('your own optimizer'):
            rule = program.optimizer(config)
            begun = jax.eval_shape(rule.init, program.shapes)
            updates, _ = jax.eval_shape(
                rule.update, program.shapes, begun, program.shapes, value=0.0
            )
            if jax.tree.map(jnp.shape, updates) != jax.tree.map(jnp.shape, program.shapes):
                raise UserError('its updates are not of the shapes of the parameters')
    return program


def _checked_layers(program: Program, frozen: Callable[[str], bool]) -> dict[str, bool]:
    """Trace a training pass over images, and check its logits and the frozen statistics.

    Returns:
        The layers in the order of their calls, and whether training changes their outputs.
    """
    spec, trained = program.spec, {name.rpartition('/')[0] for name in program.trainable}
    whole, layers = dataclasses.replace(program, cached=''), {}

    def note(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        path = '/'.join(context.module.path)
        if path and path not in layers and context.method_name == '__call__':
            inside = any(f'{each}/'.startswith(f'{path}/') for each in trained)
            layers[path] = inside or any(each in trained for each in layers)
        return call(*args, **kwargs)

    def run(batch_stats: Any, weights: Any, images: Any, key: Any) -> Any:
        variables = {'params': weights, 'batch_stats': batch_stats}
        with nn.intercept_methods(note):
            logits, statistics, _ = whole.forward(program.config, variables, images, key)
        return statistics, logits

    # As many as there are at once: ghost norm and its like take no other number.
    number = program.config.data.batch // program.config.optimizer.accumulate
    images = jax.ShapeDtypeStruct((number, *spec.image_shape), jnp.uint8)
    inputs = jax.eval_shape(spec.prepare, images), jax.eval_shape(lambda: rng.key(0, 'dropout'))
    trace = jax.make_jaxpr(run, return_shape=True)
    jaxpr, (_, logits) = trace(program.statistics, program.shapes, *inputs)
    outputs = program.config.model.outputs or spec.num_classes
    outputs = outputs if spec.num_classes == 2 else spec.num_classes
    if getattr(logits, 'shape', None) not in ((number, spec.num_classes), (number, outputs)):
        raise UserError(
            f'the network returns {getattr(logits, "shape", type(logits).__name__)} for {number} '
            f'images of {spec.num_classes} classes; it must return logits '
            f'[{number}, {spec.num_classes}]'
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise UserError(f'the network returns {logits.dtype}; logits are real numbers')
    freezing.check_statistics(jaxpr, program.statistics, frozen)
    return layers


def _check_inference(program: Program) -> None:
    """Trace a pass in inference, which must neither draw random numbers nor change statistics."""
    spec = program.spec
    net = spec.network(program.config)
    variables = {'params': program.shapes, 'batch_stats': program.statistics}
    images = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.uint8)
    inputs = jax.eval_shape(spec.prepare, images)
    mode: dict[str, Any] = freezing.mode_arguments(net, train=False)
    try:
        with nn.intercept_methods(program.evaluating):
            jax.eval_shape(functools.partial(net.apply, **mode), variables, inputs)
    except (UserError, InvalidRngError, ModifyScopeVariableError) as error:
        raise UserError(
            'the network draws random numbers, or changes its batch statistics, in inference; let '
            f'its __call__ take an argument ({", ".join(freezing.MODES)}) that stops it'
        ) from error


def _select_layers(program: Program, layers: dict[str, bool], field: str) -> list[str]:
    """The layers that a regularizer of activations looks at, of which training must reach one."""
    patterns = cfg.get(program.config, field)
    matched = params.select(layers, patterns, field=f'config.{field}', called='layer')
    useful = [path for path in matched if layers[path]]
    if not useful:
        raise UserError(
            f'config.{field} is {patterns}, which matches layers that training does not reach, so '
            'it would change nothing; name some after the first trained one'
        )
    return useful


def trainable_by_phase(config: cfg.Config, names: list[str]) -> list[list[str]]:
    """The parameters that each phase trains first; UserError if the second freezes any of them."""
    first = params.trainable(names, config.train.frozen)
    if not config.unfreeze.epochs:
        return [first]
    frozen = params.select(names, config.unfreeze.frozen, field='config.unfreeze.frozen')
    if lost := sorted(set(first) & set(frozen)):
        raise UserError(
            f'config.unfreeze.frozen freezes {lost[0]}, which the first phase trains; '
            'a second phase only trains more'
        )
    return [first, [name for name in names if name not in {*first, *frozen}]]


def update_groups(
    config: cfg.Config, spec: RunSpec, members: Sequence[Sequence[str]]
) -> list[optim.Group]:
    """One group a phase: the second has a schedule of its own and rates that fall with depth.

    rate(w) = unfreeze.learning_rate · schedule · unfreeze.depth_decay^(depth(w) − 1), with depth 1
    for the block next to the head (discriminative fine-tuning, Howard & Ruder 2018).
    """
    last, per_epoch = spec.phase_ends[-1], spec.steps_per_epoch
    groups = [optim.Group(members[0], optim.schedule(config.optimizer, per_epoch, last))]
    if len(members) > 1:
        slow = dataclasses.replace(config.optimizer, learning_rate=config.unfreeze.learning_rate)
        rate = optim.schedule(slow, per_epoch, last - spec.phase_ends[0])
        depths = params.depths([*members[0], *members[1]])
        decay = jnp.asarray(config.unfreeze.depth_decay, jnp.float32)
        scales = {name: decay ** max(depths[name] - 1, 0) for name in members[1]}
        groups.append(optim.Group(members[1], rate, scales))
    return groups


def _draw(config: cfg.Config, spec: RunSpec, seed: Any) -> dict[str, Any]:
    """The variables of the network, drawn at random."""
    net, blank = spec.network(config), np.zeros((1, *spec.image_shape), np.uint8)
    mode: dict[str, Any] = freezing.mode_arguments(net, train=False)
    variables: Any = net.init(rng.key(seed, 'params'), spec.prepare(jnp.asarray(blank)), **mode)
    return dict(meta.unbox(variables))


def state_maker(program: Program) -> Callable[[int], State]:
    """The function from a seed to the state before the first step of a run.

    Initial weights depend on the seed and the parameter's path alone, so arms share them.
    """
    config, spec = program.config, program.spec
    trained = params.partition(program.shapes, program.trainable)[0]
    least, there = params.nbytes((program.shapes, trained)), runtime.memory()
    if least > there:
        sizes = f'take {least / 1e9:,.0f} GB and the devices have {there / 1e9:,.0f} GB'
        raise UserError(f'the weights and their gradients {sizes}; make the network smaller')
    shapes = {'params': program.shapes, 'batch_stats': program.statistics}
    given = params.flatten(spec.pretrained(shapes)) if spec.pretrained else {}

    # Compiled once, run once a seed: at this level it compiles in a third of the time.
    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 1})
    def draw_the_rest(seed):
        flat = params.flatten(_draw(config, spec, seed))
        return {path: leaf for path, leaf in flat.items() if path not in given}

    first = program.members[0]

    def make(seed: int) -> State:
        copies = {path: jnp.copy(leaf) for path, leaf in given.items()}
        variables = params.unflatten(draw_the_rest(np.uint32(seed)) | copies)
        weights, batch_stats = variables['params'], variables.get('batch_stats', {})
        flat = params.flatten(weights)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=weights,
            batch_stats=batch_stats,
            opt_state=program.optimizer(config, phases=1).init(weights),
            averaged=_copies(flat, first) if program.averages else {},
            init_params=_copies(flat, [path for path in _anchored(program) if path in first]),
            eval_batch_stats=jax.tree.map(jnp.copy, batch_stats)
            if config.train.precise_norm
            else {},
        )

    return make


def frozen_weights(program: Program) -> params.Flat:
    """The parameters that a file of weights brings and no phase trains, by path."""
    given = program.spec.pretrained
    if not given:
        return {}
    by_phase = trainable_by_phase(program.config, [*params.flatten(program.shapes)])
    ever = {path for trained in by_phase for path in trained}
    variables = given({'params': program.shapes, 'batch_stats': program.statistics})
    return params.partition(variables['params'], ever)[1]


def begin_phase(program: Program, state: State) -> State:
    """The state at the start of a later phase, from the last one of the phase before.

    What the phase before trained keeps its optimizer state; what is new starts with a fresh one.
    """
    flat = params.flatten(state.params)
    fresh: Any = program.optimizer(program.config).init(state.params)
    kept = state.opt_state.inner_states
    averaged = _copies(flat, program.trainable) if program.averages else {}
    return dataclasses.replace(
        state,
        opt_state=fresh._replace(inner_states=fresh.inner_states | kept),
        averaged=averaged | state.averaged,
        init_params=_copies(flat, _anchored(program)) | state.init_params,
    )


def eval_state_shapes(program: Program) -> State:
    """The shapes of a phase's state without its optimizer's, which evaluation does not need."""
    flat = params.flatten(program.shapes)
    return State(
        step=jax.ShapeDtypeStruct((), jnp.int32),  # pyright: ignore
        params=program.shapes,
        batch_stats=program.statistics,
        opt_state=None,
        averaged={path: flat[path] for path in program.trainable} if program.averages else {},
        init_params={path: flat[path] for path in _anchored(program)},
        eval_batch_stats=program.statistics if program.config.train.precise_norm else {},
    )


def _anchored(program: Program) -> list[str]:
    """Paths of the parameters whose initial values a regularizer needs."""
    fields = [r.on for r in program.regularizers if r.needs_initial]
    acted_on = program.acted_on | {'': program.trainable}
    return sorted({path for field in fields for path in acted_on[field]})


def _copies(flat: params.Flat, names: Sequence[str]) -> params.Flat:
    # The step donates its input, and a buffer cannot be donated twice.
    return {name: jnp.copy(flat[name]) for name in names}


def parameter_table(program: Program) -> str:
    """Which parameters a phase trains, freezes and penalizes, with counts and bytes."""
    config, acted_on, train = program.config, program.acted_on, set(program.trainable)
    marks = {
        'l2': acted_on['loss.l2_on'] if config.loss.l2 else (),
        'weight_decay': acted_on['optimizer.decay_on'] if config.optimizer.weight_decay else (),
    }
    flat = params.flatten(program.shapes)
    width = max(map(len, flat))
    lines = [f'{"parameter":<{width}}  {"shape":<18} {"count":>12}  state     decay']
    for path, leaf in flat.items():
        decay = ' '.join(name for name, paths in marks.items() if path in paths)
        state = 'trained' if path in train else 'frozen'
        shape = '×'.join(map(str, leaf.shape))
        lines.append(f'{path:<{width}}  {shape:<18} {leaf.size:>12,}  {state:<9} {decay}'.rstrip())
    for name, part in zip(('trained', 'frozen'), params.partition(program.shapes, train)):
        count = sum(leaf.size for leaf in part.values())
        lines.append(f'{name:<{width}}  {"":<18} {count:>12,}  {4 * count / 1e6:,.2f} MB')
    return '\n'.join(lines)
