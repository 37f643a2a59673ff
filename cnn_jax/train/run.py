"""A run and its work directory: `fit` trains it, `load_run` opens it again.

The launchers call the same functions, so a run is the same whoever starts it: it resumes, is
locked, is checked and is recorded in the same way.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax import components as own
from cnn_jax import config as cfg
from cnn_jax import files, mesh, runtime
from cnn_jax.ablation.plan import Range
from cnn_jax.ablation.tuning import choose
from cnn_jax.components import Components
from cnn_jax.errors import UserError, reason_of
from cnn_jax.summary import Layer, layers, table_of
from cnn_jax.tools import figures, profile
from cnn_jax.tools.selfcheck import self_check
from cnn_jax.train import loop, manifest, metrics, remote, setup
from cnn_jax.train.checkpoint import Checkpoints, digest
from cnn_jax.train.program import (
    Program,
    RunSpec,
    State,
    eval_state_shapes,
    frozen_weights,
    make_program,
    parameter_table,
    traced_values,
)
from cnn_jax.train.record import data_notes, read_lines
from cnn_jax.train.step import predict_step
from cnn_jax.train.trackers import Tracker, plain, tracked
from cnn_jax.train.trackers import check as check_trackers


class Curves(dict):
    """Learning curves by split and name: `curves['eval']['accuracy']`, a number an evaluation."""

    def __init__(self, lines: list[dict[str, Any]]):
        self._lines = lines
        for split in {line['split']: None for line in lines}:
            of_split = [line for line in lines if line['split'] == split]
            numbers = [k for k, value in of_split[-1].items() if isinstance(value, (int, float))]
            self[split] = {name: np.array([line[name] for line in of_split]) for name in numbers}

    def plot(self) -> Any:
        """Return a Matplotlib figure of loss and accuracy against epochs."""
        return figures.curves_figure(self._lines)


@dataclass(frozen=True, repr=False)
class Run:
    """A run that `fit` trained, or that `load_run` opened: enough to evaluate and to predict.

    >>> run = load_run('runs/small')  # doctest: +SKIP
    >>> run.predict(images).argmax(axis=-1)  # doctest: +SKIP
    """

    workdir: str  # its folder, or the URL that was given
    config: cfg.Config
    manifest: dict[str, Any]  # its origin: code, packages, machine, data
    spec: RunSpec  # shapes, preprocessing and length
    program: Program  # the phase of the state
    state: State  # at `step`; of a run that was opened again, without the optimizer's
    step: int  # the steps done; with early stopping those of the best evaluation
    metrics: dict[str, Any]  # loss, accuracy, … on the evaluation split at that step; {} if none
    curves: Curves
    source: Callable[[cfg.Config, str], Any] | None = None  # own images, where they can be had
    stopped: bool = False  # whether `fit` was interrupted, and saved; the same call resumes
    folder: Path = Path()  # `workdir`, or the local copy of a remote one

    def __repr__(self) -> str:
        scores = ', '.join(f'{k} {v:.4f}' for k, v in metrics.scalars(self.metrics).items())
        state = 'stopped at' if self.stopped else 'trained to'
        return (
            f'<Run {self.workdir}: {type(self.model).__name__} on {_data_name(self.config)}, '
            f'{state} step {self.step} of {self.spec.phase_ends[-1]}; '
            f'{scores or "not evaluated yet"}>'
        )

    @property
    def model(self) -> nn.Module:
        """The network; the built-in ones are called as `model(prepared images, train=False)`."""
        return self.spec.network(self.config)

    @property
    def variables(self) -> dict[str, Any]:
        """The network's variables in inference: averaged weights where there are any."""
        return self.state.eval_variables

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.manifest['data']['class_names']

    @functools.cached_property
    def _predict(self) -> Callable:
        return jax.jit(functools.partial(predict_step, self.program))

    def predict(self, images: UInt8[np.ndarray, 'n h w c']) -> Float[np.ndarray, 'n k']:
        """Return the class probabilities of images.

        Args:
            images: uint8 pixels of the size that the run was trained on; one may come without its
                first axis. Others are a UserError.
        """
        images = np.asarray(images)
        if images.shape == self.spec.image_shape:
            images = images[None]
        if images.dtype != np.uint8 or images.shape[1:] != self.spec.image_shape:
            raise UserError(
                f'the images are {images.dtype} {list(images.shape)}; this run takes uint8 '
                f'[n, {", ".join(map(str, self.spec.image_shape))}]'
            )
        # One image costs one; powers of two, so that few programs serve all numbers.
        few = 1 << max(len(images) - 1, 0).bit_length()
        size = min(few, self.config.data.eval_batch or self.config.data.batch)
        values, parts = traced_values(self.config), []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append(np.exp(self._predict(self.state, padded, values))[: len(part)])
        return np.concatenate(parts) if parts else np.zeros((0, len(self.class_names)), np.float32)


def fit(
    config: cfg.Config,
    workdir: str | Path,
    model: Any = None,
    train: Any = None,
    eval: Any = None,
    optimizer: Any = None,
    *,
    regularizers: Sequence[Any] = (),
    tune: Mapping[str, Range] | None = None,
    components: Components | None = None,
    wait: bool = False,
    live: bool | None = None,
    trace: bool = False,
    trackers: Sequence[str | Tracker] = (),
    model_parallel: int = 1,
    fsdp: bool = False,
    distributed: bool = False,
    say: Callable[[str], object] = print,
) -> Run:
    """Train a network, or resume its training; None stands for what the config names.

    Args:
        config: The run's config; its `epochs`, `batch`, `l2`, … hold for own parts, too.
        workdir: The folder of the run, created if missing, or a URL such as gs://BUCKET/RUN.
        model: A Flax module that maps float images [b, h, w, c] to logits [b, classes], or a
            function `(config, num_classes) -> module`.
        train, eval: Both splits: a `Source`, or `(images, labels)`.
        optimizer: An Optax transformation, or a function `config -> transformation`. Frozen
            parameters (`config.train.frozen`) are masked out of it.
        regularizers: `Regularizer` objects, beside the built-in ones.
        tune: What `config.train.trials` short runs choose on the held-out images before this one,
            `{config path: log(low, high)}` (`cnn_jax.ablation.log`, `linear`).
        components: All of these as one object.
        wait: Whether to wait for another process that trains in the work directory.
        live: Whether to draw a progress bar; by default on a terminal and in a notebook.
        trace: Whether to trace five steps soon after the start into the folder `profile`.
        trackers: Where else to log: `tensorboard` (its HParams), `wandb`, `mlflow`, or objects with
            the methods of `cnn_jax.train.trackers.Tracker`.
        model_parallel, fsdp: The way in which devices share parameters (`mesh.make_mesh`).
        distributed: Whether this process is one of several.
        say: Called with each line for the user.

    Returns:
        The run at its end, or where it was interrupted (SIGTERM, Ctrl-C) and saved.

    Errors:
        UserError: Something in the arguments, the data or the work directory must be mended.
        RunFailed: The loss is not finite, or the disk is full.

    >>> run = fit(Config(train=Train(epochs=5)), 'runs/first')  # doctest: +SKIP
    """
    components = own.one_of(components, model, train, eval, optimizer, regularizers)
    config = cfg.validate(components.mark(config))
    if tune and not config.train.trials:
        raise UserError('tune has no effect while config.train.trials is 0; set it, to 8 say')
    check_trackers(trackers)
    url = str(workdir) if remote.is_remote(str(workdir)) else ''
    copy = remote.Mirror(url) if url else None
    folder = copy.folder if copy else Path(workdir).expanduser()
    with contextlib.ExitStack() as stack:

        def claim() -> int:
            """Take possession of the work directory; return the threads of its run."""
            stack.enter_context(lock_workdir(copy.base if copy else folder, wait))
            if copy:
                copy.resume()
            claim_workdir(folder, config)
            threads = manifest.threads(folder, config)
            if copy:  # not before everything that may be refused
                copy.take()
            return threads

        if distributed:
            settings = start(config.train.threads, distributed=True)
            mesh.on_process_zero(claim)
        else:
            settings = start(claim())
        say(str(settings))
        if config.train.threads not in (0, settings.threads):
            say(
                f'note: config.train.threads is {config.train.threads}, but JAX has started with '
                f'{runtime.count(settings.threads, "thread")} in this process, which train the run'
            )
        layout = setup.layout_of(config, model=model_parallel, fsdp=fsdp)
        job = _Job(
            config, config, components, str(workdir), folder, settings, layout, say, trackers
        )
        saved = functools.partial(mesh.on_process_zero, copy.push) if copy else None
        run = job.start(tune or {}, live, trace, saved)
        if not copy:
            return run
        mesh.on_process_zero(lambda: copy.push(last=True))
        return run


@dataclass(frozen=True)
class _Job:
    """The work of one call of `fit`, its work directory being locked."""

    asked: cfg.Config  # as it was given
    config: cfg.Config  # with what was tuned
    components: Components
    workdir: str
    folder: Path
    settings: runtime.Settings
    layout: mesh.Layout | None
    say: Callable[[str], object]
    trackers: Sequence[str | Tracker]
    ranges: Mapping[str, str] = field(default_factory=dict)  # of what was tuned, in words

    def start(
        self,
        tune: Mapping[str, Range],
        live: bool | None,
        trace: bool,
        saved: Callable[[], object] | None,
    ) -> Run:
        clock = profile.CompileClock()
        data = setup.open_data(self.config, self.layout, self.components)
        self._check(data)
        if not self.config.train.trials:
            return self.train(data, clock, live, trace, saved)
        before = mesh.on_process_zero(lambda: manifest.stored(self.folder))
        ranges = {path: str(each) for path, each in tune.items()}
        if before and ranges and before.get('tune', ranges) != ranges:
            raise UserError(
                f'the run in {self.folder} was tuned over {before["tune"]}, not {ranges}; restore '
                'it, or choose another --workdir'
            )
        chosen = before['tuned'] if before else self._tuned(data, tune)
        tuned = replace(self, config=cfg.replace(self.config, chosen), ranges=ranges)
        return tuned.train(data, clock, live, trace, saved)

    def _tuned(self, data: setup.Data, tune: Mapping[str, Range]) -> dict[str, float]:
        """What the trials choose, by config path."""
        if mesh.is_multiprocess():
            raise UserError(
                'config.train.trials tunes in a single process; tune there, then set the values '
                'and config.train.trials=0'
            )
        if self.layout:  # trials are small: one device trains them
            data = setup.open_data(self.config, None, self.components)
        return choose(self.config, data, tune, self.folder, self.components, self.say)

    def train(
        self,
        data: setup.Data,
        clock: profile.CompileClock,
        live: bool | None,
        trace: bool,
        saved: Callable[[], object] | None,
    ) -> Run:
        config, folder, layout = self.config, self.folder, self.layout
        spec = setup.make_spec(config, data.description, data.weights, self.components)
        self._introduce(data, spec)
        with own.blamed_on('the own model' if spec.model else None):
            net, shape = spec.network(config), setup.prepared_shape(spec)
            rows = layers(net, shape)
            self.say(table_of(rows))
        phases, state = setup.open_phases(config, data, spec, layout)
        for number, phase in enumerate(phases, start=1):
            cut = phase.program.cached
            kind = f'cached features of {cut}' if cut else 'images'
            self.say(f'phase {number}, to step {phase.end:,}, on {kind}:')
            self.say(parameter_table(phase.program))
        self._begin(data, state)
        tracer = None
        if trace:  # each process traces; the first one's is kept
            traces = folder / 'profile' if mesh.is_process_zero() else Path(tempfile.mkdtemp())
            tracer = functools.partial(
                profile.trace, traces, [row.path for row in rows if row.path]
            )
        options = {'layout': layout, 'live': live, 'profile': tracer, 'saved': saved}
        logged = self.trackers if mesh.is_process_zero() else ()
        settings, name = plain(cfg.to_flat(config)), Path(self.workdir).name
        with tracked(logged, folder, name, settings, self.say) as tell:
            options['scalars'] = functools.partial(tell, 'scalars')
            outcome = loop.train(config, spec, phases, state, folder, **options)
            if outcome.metrics:
                tell('hyperparameters', settings, metrics.scalars(outcome.metrics))
        self._report(outcome, phases, rows, clock)
        program = phases[loop.phase_at(phases, int(outcome.state.step))].program
        return Run(
            self.workdir,
            config,
            manifest.read(folder)[1] if mesh.is_process_zero() else {'data': data.description},
            spec,
            replace(program, cached=''),  # whoever has the run predicts from images
            mesh.gather_to_host(outcome.state) if layout else outcome.state,
            int(outcome.state.step),
            metrics.as_json(outcome.metrics) if outcome.metrics else {},
            Curves(read_lines(folder / 'metrics.jsonl')),
            self.components.source,
            outcome.stopped,
            folder,
        )

    def _check(self, data: setup.Data) -> None:
        """Refuse data that have changed since the run began; list the images left out."""
        mesh.on_process_zero(lambda: manifest.check_data(self.folder, data.description))
        folder = self.folder if mesh.is_process_zero() else None
        notes = data_notes(folder, data.train, data.evaluate)
        for line in (*notes, *setup.shared_images(self.config, data)):
            self.say(line)

    def _introduce(self, data: setup.Data, spec: RunSpec) -> None:
        """Print what is trained, on what, and what will have no effect."""
        if data.weights:
            short = f'{data.weights.digest[:12]}…'
            self.say(f'weights: {data.weights.source}, digest {short}, {data.weights.licence}')
        devices = f'{runtime.devices()}, {self.layout}' if self.layout else runtime.devices()
        self.say(
            f'{_data_name(self.config)}: {data.train.n:,} training and {data.evaluate.n:,} '
            f'evaluation images, {setup.shape_text(spec.image_shape)}, {spec.num_classes} '
            f'classes; {spec.phase_ends[-1]:,} steps of {self.config.data.batch} on {devices}'
        )
        for note in cfg.averaging_notes(self.config, spec.phase_ends[-1]):
            self.say(f'note: {note}')
        unread = cfg.unread(self.config, spec.image_shape[-1])
        if unread := [*unread, *self.components.unread(self.config)]:
            self.say(f'note: without effect: {"; ".join(unread)}')

    def _begin(self, data: setup.Data, state: State) -> None:
        """Write the manifest, or note what has changed since the run began."""
        now = manifest.manifest(self.asked, self.settings, data.description, self.layout)
        if self.config.train.trials:
            now['tuned'] = {p: a for p, (_, a) in cfg.differences(self.asked, self.config).items()}
            now['tune'] = dict(self.ranges)
        if self.config.own:
            now['own'] = self.components.facts

        def begin() -> list[str]:
            if manifest.stored(self.folder) is None:
                now['initial_state'] = digest(state)
            return manifest.begin(self.folder, now)

        for note in mesh.on_process_zero(begin):
            self.say(f'note: {note}')

    def _report(
        self,
        outcome: loop.Outcome,
        phases: list[loop.Phase],
        rows: list[Layer],
        clock: profile.CompileClock,
    ) -> None:
        """Print how the run ended and how fast it was."""
        if outcome.stopped:
            self.say(f'stopped and saved; the same command resumes from here ({self.workdir})')
        else:
            assert outcome.metrics is not None
            times = max(count for counts in outcome.compilations for count in counts.values())
            self.say(f'compilations of each step in each phase: {times}')
            final = ', '.join(f'{k} {v:.4f}' for k, v in metrics.scalars(outcome.metrics).items())
            self.say(f'done: {final}\nresults in {self.workdir}')
            for note in metrics.doubts(outcome.metrics, phases[0].program.spec.num_classes):
                self.say(f'note: {note}')
        if not mesh.is_process_zero():
            return
        programs = [phase.program for phase in phases]
        again = bool(self.config.optimizer.sam) + bool(self.config.loss.r_drop)  # whole passes
        flops = [profile.training_flops(rows, p.trainable, p.cached) * 2**again for p in programs]
        dtype = self.config.model.dtype
        facts = profile.measure(outcome.watches, flops, dtype, clock, self.layout)
        profile.write_speed(self.folder, facts)
        self.say(profile.speed_line(facts))


def _data_name(config: cfg.Config) -> str:
    return 'own data' if config.data.source == cfg.OWN else config.data.source


def start(threads: int = 0, distributed: bool = False) -> runtime.Settings:
    """Prepare the process for JAX and check that it computes right; `threads` as in `configure`.

    Of several processes (`distributed`), the first one speaks for all; others print errors alone.
    """
    settings = runtime.configure(threads)
    if distributed:
        mesh.initialize()
        if not mesh.is_process_zero():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    self_check()
    return settings


def load_run(
    workdir: str | Path,
    which: str | None = None,
    *,
    model: Any = None,
    optimizer: Any = None,
    regularizers: Sequence[Any] = (),
) -> Run:
    """Open the run in a work directory at one of its checkpoints.

    Args:
        workdir: The folder of the run, or its URL.
        which: `latest`, or `best` by config.train.best on the evaluation split; by default the
            one that the run leaves: the best with config.train.patience, else the latest.
        model, optimizer, regularizers: Those that `fit` was given, if it was. An experiment file's
            are found again where it was.

    Errors:
        UserError: The folder holds no run or no such checkpoint, or own parts are missing or not
            those of the run.
    """
    name = str(workdir)
    folder = remote.fetch_workdir(name)
    config, facts = manifest.read(folder)
    start(manifest.threads(folder, config))
    given = own.from_objects(model, None, None, optimizer, regularizers)
    components = own.reopened(config, facts, given)
    spec = setup.make_spec(config, facts['data'], components=components)

    def frozen() -> dict[str, Any]:
        """The pretrained weights, which are not looked for where no checkpoint needs them."""
        weights = setup.load_weights(config)
        return frozen_weights(make_program(config, setup.make_spec(config, facts['data'], weights)))

    checkpoints = Checkpoints(folder / 'checkpoints', config, frozen=frozen)
    which = which or ('best' if config.train.patience else 'latest')
    step = {'latest': checkpoints.latest, 'best': checkpoints.best}[which]()
    if step is None:
        raise UserError(f'{folder} has no {which} checkpoint yet; train it further')
    program = make_program(config, spec, phase=int(step > spec.phase_ends[0]))
    state, _ = checkpoints.restore(step, eval_state_shapes(program))
    lines = read_lines(checkpoints.place(step) / 'metrics.jsonl')  # which is known to be whole
    curves, scores = Curves(lines), {}
    for line in lines:
        if (line['step'], line['split']) == (step, 'eval'):
            scores = {k: v for k, v in line.items() if k not in ('step', 'split', 'epoch')}
    parts = config, facts, spec, program, state, step, scores, curves, components.source
    return Run(name, *parts, folder=folder)


@contextlib.contextmanager
def lock_workdir(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a work directory, created if missing; UserError if another does."""
    files.make_writable(folder)
    path = folder / 'lock'
    if wait and (other := files.lock_holder(path)):
        print(f'waiting for process {other[1]} on {other[0]}, which trains in {folder}', flush=True)
    # The folder, too: the lock's file may be removed.
    with files.lock(folder, wait) as first, files.lock(path, wait) as second:
        if not first or not second:
            host, process = files.lock_holder(path) or ('another machine', '?')
            raise UserError(
                f'process {process} on {host} is training in {folder}; give --wait to resume after '
                'it, or choose another --workdir'
            )
        yield


def claim_workdir(folder: Path, config: cfg.Config) -> None:
    """Make the work directory that of a run, or check that it belongs to one of the same config.

    What ended before its first step, by a usage error for one, does not count as a run. A larger
    number of epochs prolongs the run, where no step depends on it.

    Errors:
        UserError: It holds an ablation, or a run of another config (the difference is listed).
    """
    if (folder / 'ablation.json').exists():
        raise UserError(f'{folder} holds an ablation; choose another --workdir')
    for inside in ('profile', 'damaged', 'checkpoints', 'checkpoints/*'):
        if link := next(filter(Path.is_symlink, folder.glob(inside)), None):
            raise UserError(f'{link} is a link, and training writes to no other place; remove it')
    before, digest = manifest.stored(folder), cfg.content_hash(config)
    if before and before['config_hash'] != digest:
        try:
            old = cfg.from_json(files.read_text(folder / 'config.json'))
        except (FileNotFoundError, files.Corrupt) as error:
            raise UserError(
                f'the work directory {folder} belongs to a run of another config, and its '
                f'config.json is missing or damaged ({reason_of(error)}); choose another --workdir'
            ) from error
        longer = config.train.epochs > old.train.epochs
        steps = {cfg.content_hash(cfg.without_length(each)) for each in (old, config)}
        if not longer or len(steps) > 1:
            raise UserError(_refusal(folder, cfg.differences(old, config), longer))
        files.write_json(folder / manifest.NAME, before | {'config_hash': digest}, indent=2)
    files.write_text(folder / 'config.json', cfg.to_json(config))


def _refusal(folder: Path, changed: dict[str, tuple[Any, Any]], longer: bool) -> str:
    listed = '; '.join(f'config.{name}: {old!r} → {new!r}' for name, (old, new) in changed.items())
    what, more = f'another config ({listed})', ''
    if list(changed) == ['own']:
        what = 'other code of its own parts'
    if longer and list(changed) == ['train.epochs']:
        more = (
            '; a run can be prolonged where no step depends on its length: without a cosine '
            'schedule, model.drop_ramp, a second phase and own parts'
        )
    return (
        f'the work directory {folder} belongs to a run of {what}; restore it, or choose another '
        f'--workdir{more}'
    )
