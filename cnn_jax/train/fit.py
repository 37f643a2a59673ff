"""Training a run: `fit`, which the launchers call, too.

So a run is the same whoever starts it: it resumes, is locked, is checked and is recorded in the
same way.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cnn_jax import components as own
from cnn_jax import config as cfg
from cnn_jax import mesh, runtime
from cnn_jax.ablation.plan import Range
from cnn_jax.ablation.tuning import choose
from cnn_jax.components import Components
from cnn_jax.errors import UserError
from cnn_jax.files import workdir_path
from cnn_jax.summary import Layer, layers, table_of
from cnn_jax.tools import profile
from cnn_jax.train import loop, manifest, metrics, remote, setup
from cnn_jax.train.checkpoint import digest
from cnn_jax.train.program import RunSpec, State, parameter_table
from cnn_jax.train.record import data_notes, read_lines
from cnn_jax.train.run import Curves, Run, data_name, start
from cnn_jax.train.trackers import Tracker, plain, tracked
from cnn_jax.train.trackers import check as check_trackers


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
    if not isinstance(tune, Mapping | None):
        raise UserError('tune must be {config path: log(low, high)}')
    check_trackers(trackers)
    workdir = workdir_path(workdir)
    url = str(workdir) if remote.is_remote(str(workdir)) else ''
    copy = remote.Mirror(url) if url else None
    folder = copy.folder if copy else Path(workdir)
    with contextlib.ExitStack() as stack:

        def claim() -> int:
            """Take possession of the work directory; return the threads of its run."""
            stack.enter_context(manifest.lock_workdir(copy.base if copy else folder, wait, say))
            if copy:
                copy.resume(say)
            manifest.claim_workdir(folder, config)
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
        saved = functools.partial(mesh.on_process_zero, copy.push) if copy else None
        place = str(workdir), folder
        how = settings, layout, say, trackers, live, trace, saved
        run = _Job(config, config, components, *place, *how).start(tune or {})
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
    live: bool | None
    trace: bool
    saved: Callable[[], object] | None
    ranges: Mapping[str, str] = field(default_factory=dict)  # of what was tuned, in words
    clock: profile.CompileClock = field(default_factory=profile.CompileClock)

    def start(self, tune: Mapping[str, Range]) -> Run:
        data = setup.open_data(self.config, self.layout, self.components)
        self._check(data)
        if not self.config.train.trials:
            return self.train(data)
        before = mesh.on_process_zero(lambda: manifest.stored(self.folder))
        ranges = {path: str(each) for path, each in tune.items()}
        if before and ranges and before.get('tune', ranges) != ranges:
            raise UserError(
                f'the run in {self.folder} was tuned over {before["tune"]}, not {ranges}; restore '
                'it, or choose another --workdir'
            )
        chosen = before['tuned'] if before else self._tuned(data, tune)
        tuned = replace(self, config=cfg.replace(self.config, chosen), ranges=ranges)
        return tuned.train(data)

    def _tuned(self, data: setup.Data, tune: Mapping[str, Range]) -> dict[str, float]:
        """The choice of the trials, by config path."""
        if mesh.is_multiprocess():
            raise UserError(
                'config.train.trials tunes in a single process; tune there, then set the values '
                'and config.train.trials=0'
            )
        if self.layout:  # trials are small: one device trains them
            data = setup.open_data(self.config, None, self.components)
        return choose(self.config, data, tune, self.folder, self.components, self.say)

    def train(self, data: setup.Data) -> Run:
        config, folder, layout = self.config, self.folder, self.layout
        spec = setup.make_spec(config, data.description, data.weights, self.components)
        self._introduce(data, spec)
        with own.blamed_on('your own model' if spec.model else None):
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
        if self.trace:  # each process traces; the first one's is kept
            traces = folder / 'profile' if mesh.is_process_zero() else Path(tempfile.mkdtemp())
            tracer = functools.partial(
                profile.trace, traces, [row.path for row in rows if row.path]
            )
        options = {
            'layout': layout,
            'live': self.live,
            'profile': tracer,
            'saved': self.saved,
        }
        logged = self.trackers if mesh.is_process_zero() else ()
        settings, name = plain(cfg.to_flat(config)), Path(self.workdir).name
        with tracked(logged, folder, name, settings, self.say) as tell:
            options['scalars'] = functools.partial(tell, 'scalars')
            outcome = loop.train(config, spec, phases, state, folder, **options)
            if outcome.metrics:
                tell('hyperparameters', settings, metrics.scalars(outcome.metrics))
        self._report(outcome, phases, rows)
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
            f'{data_name(self.config)}: {data.train.n:,} training and {data.evaluate.n:,} '
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

    def _report(self, outcome: loop.Outcome, phases: list[loop.Phase], rows: list[Layer]) -> None:
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
        facts = profile.measure(outcome.watches, flops, dtype, self.clock, self.layout)
        profile.write_speed(self.folder, facts)
        self.say(profile.speed_line(facts))
