"""The shared parts of the launchers: flags, plain errors, exit codes, the process's set-up.

Exit codes: 0 success, 1 a failed run, 2 a usage error, 75 interrupted after saving, 130
stopped by Ctrl-C (143 by SIGTERM) before there was anything to save.
"""

import builtins
import functools
import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from logging import CRITICAL, getLogger
from typing import Any, NoReturn

from absl import flags

from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.components import Components, from_experiment, get_config
from cnn_jax.errors import RunFailed, UserError, nearest, printable
from cnn_jax.fields import field_at, from_text
from cnn_jax.files import local_path, workdir_path

PRINT = print  # as Python has it
_overrides: dict[str, Any] = {}  # the values of --config.KEY=VALUE

OK, FAILED, MISTAKE, STOPPED, INTERRUPTED, TERMINATED = 0, 1, 2, os.EX_TEMPFAIL, 130, 143
DEBUG = re.compile(r'--?debug(=(?i:true|t|yes|y|1))?')

# The flags defined here belong to the launcher that asks for them: its --help shows them.
flags.disclaim_key_flags()

flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')


class _Path(flags.ArgumentParser):
    """A path flag: `~` is expanded, and an empty value is refused."""

    def __init__(self, name: str, url: bool):
        self.name, self.url = name, url

    def parse(self, argument: str) -> str:
        if '://' in argument and not self.url:
            raise UserError(
                f'--{self.name} is {argument}, but an object store cannot be used here; give a '
                'path of this machine'
            )
        path = workdir_path if self.name == 'workdir' else local_path
        return path(argument, f'--{self.name}')


def define_path(
    name: str,
    text: str,
    default: str | None = None,
    *,
    required: bool = False,
    url: bool = False,
) -> Any:
    """A flag that takes a path.

    Args:
        name, text, default: The flag's name, help and value where it is not given.
        required: Whether it must be given.
        url: Whether it may be a URL such as gs://BUCKET/RUN.
    """
    return flags.DEFINE(_Path(name, url), name, default, text, required=required)


def define_workdir(text: str, url: bool = False) -> flags.FlagHolder:
    """The --workdir flag, required."""
    return define_path('workdir', text, required=True, url=url)


def define_checkpoint() -> flags.FlagHolder:
    """The --checkpoint flag of what opens a run."""
    return flags.DEFINE_enum(
        'checkpoint',
        None,
        ['latest', 'best'],
        'Which checkpoint; best is by config.train.best. By default the latest, or the best if the '
        'run has config.train.patience.',
    )


def define_layout() -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """The flags --model_parallel and --fsdp, as `mesh.make_mesh` takes them."""
    model = flags.DEFINE_integer(
        'model_parallel', 1, 'How many devices share each large matrix.', lower_bound=1
    )
    fsdp = flags.DEFINE_bool(
        'fsdp',
        False,
        'Divide every large array of the state among the devices that share the batch.',
    )
    return model, fsdp


def define_trackers() -> flags.FlagHolder:
    """The flag --trackers, as `fit` and `ablate` take it."""
    return flags.DEFINE_list(
        'trackers',
        [],
        'Where else to log, separated by commas: tensorboard (its HParams), wandb, mlflow (to be '
        'installed first).',
    )


def define_config() -> flags.FlagHolder:
    """The --config=FILE flag, required, beside which --config.KEY=VALUE overrides may stand."""
    return define_path(
        'config',
        'The experiment: a Python file with get_config(), which is executed. Override any field '
        'with --config.KEY=VALUE, e.g. --config.optimizer.learning_rate=1e-3; '
        'cnn_jax/config.py says what the fields mean.',
        required=True,
    )


def overridden() -> set[str]:
    """The paths of the fields that --config.KEY=VALUE set."""
    return set(_overrides)


def read_experiment(holder: flags.FlagHolder) -> tuple[cfg.Config, Components]:
    """The validated config of a `define_config` flag, and what its file brings."""
    config, components = get_config(holder.value), from_experiment(holder.value)
    optimizer, name = config.optimizer, _overrides.get('optimizer.name', config.optimizer.name)
    if name != optimizer.name and 'optimizer.learning_rate' not in _overrides:
        print(
            f'note: config.optimizer.learning_rate is {optimizer.learning_rate:g}, which '
            f'{holder.value} chose for {optimizer.name}; set it for {name}'
        )
    return cfg.validate(components.mark(cfg.replace(config, _overrides))), components


def run(
    main: Callable[[list[str]], int | None], takes_words: bool = False, ends_unread: bool = False
) -> None:
    """Run a launcher's `main` and leave the process with its exit code.

    A `UserError` is one sentence on standard error and exit code 2; any other exception is a
    failed run, exit code 1, with one sentence, too. `--debug` shows the traceback before it.

    Args:
        main: Takes the words that are not flags, after the program's name.
        takes_words: Whether it reads them; else one is an error.
        ends_unread: Whether it ends, with exit code 0, once nobody reads its output.
    """
    arguments = sys.argv
    for stream in (sys.stdout, sys.stderr):  # file names need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    builtins.print = functools.partial(_print, ends_unread)
    debug = any(DEBUG.fullmatch(argument) for argument in arguments)
    if os.getpid() == 1:  # in a container, where the kernel drops what nobody handles
        signal.signal(signal.SIGTERM, lambda *_: os._exit(TERMINATED))
    if {'--help', '-h', '-help'} & set(arguments[1:]):
        print((sys.modules['__main__'].__doc__ or '') + flags.FLAGS.main_module_help())
        print('  --debug: Show the traceback of an error.')
        sys.exit(OK)
    try:
        words = _parse(arguments)
        if words[1:] and not takes_words:
            _refuse(words[1], arguments)
        if not debug:
            _quieten()
        if unused := runtime.forget_settings():
            print(f'note: {", ".join(unused)} of the environment: not used', file=sys.stderr)
        code = main(words) or OK
        print(end='', flush=True)
        sys.exit(code)
    except BrokenPipeError:
        _drop(sys.stdout)
        sys.exit(OK)
    except KeyboardInterrupt:  # before there was anything to save
        print('stopped', file=sys.stderr)
        _leave(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, UserError):
            print(f'error: {printable(error)}', file=sys.stderr)
            _leave(MISTAKE)
        print(f'failed: {printable(_sentence(error))}', file=sys.stderr)
        _leave(FAILED)


def _print(ends_unread: bool, *values: object, **options: Any) -> None:
    """`print` for a launcher's whole process: names of files and classes are data, not controls.

    A training goes on when the reader of its output, such as `head`, has had enough.
    """
    try:
        PRINT(*(printable(value, keep='\n\t') for value in values), **options)
    except BrokenPipeError:
        if ends_unread:
            raise
        _drop(options.get('file') or sys.stdout)


def _drop(stream: Any) -> None:
    """Write what follows to nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave(code: int) -> None:
    """End the process after an error."""
    if (mesh := sys.modules.get('cnn_jax.mesh')) and mesh.is_initialized():
        mesh.exit_now(code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f'{error.filename}: {error.strerror}; fix that and rerun the same command'
    if isinstance(error, UnicodeEncodeError):
        missing = error.object[error.start : error.end]
        return (
            f"the environment's text encoding, {error.encoding}, has no {missing!r}; "
            'set PYTHONUTF8=1 and rerun the same command'
        )
    if mesh := sys.modules.get('cnn_jax.mesh'):
        return mesh.describe_error(error)
    return f'{type(error).__name__}: {error} (--debug shows where)'


def _quieten() -> None:
    """Let libraries say nothing of their own accord: their errors are raised, and told once."""
    from absl import logging  # has flags of its own, which are not the launchers'

    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file, and of all threads that fail
    getLogger('asyncio').setLevel(CRITICAL)

    def tell(failed: threading.ExceptHookArgs) -> None:  # TensorBoard's writer is a thread
        name = failed.thread.name if failed.thread else 'a thread'
        print(f'warning: {name} stopped: {failed.exc_value}', file=sys.stderr)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f'warning: {message}', file=sys.stderr)

    usual = sys.unraisablehook

    def left_over(found: Any) -> None:  # TensorStore's threads, after a save that failed
        if str(found.exc_value) != 'Event loop is closed':
            usual(found)

    warnings.showwarning = show
    threading.excepthook, sys.unraisablehook = tell, left_over


def _parse(arguments: list[str]) -> list[str]:
    """Parse the flags, keep the overrides, and return the rest; what is wrong is a `UserError`."""
    known = flags.FLAGS
    try:
        return known(_take_overrides([arguments[0], *known.read_flags_from_files(arguments[1:])]))
    except flags.UnrecognizedFlagError as error:
        hint = nearest(error.flagname, {name: f'--{name}' for name in known})
        hint = hint or '; --help lists the flags'
        raise UserError(f'there is no flag --{error.flagname}{hint}') from error
    except flags.Error as error:
        if isinstance(error.__context__, UserError):  # of a parser of ours
            raise error.__context__ from None
        found = re.match(r'flag --(\w+)=(.*)', str(error), re.DOTALL)
        if not found:
            raise UserError(f'{error}; --help lists the flags') from error
        flag, given = known[found[1]], found[2].removesuffix(f': {error.__context__}')
        if flag.value is None and flag.default is None and 'other than None' in given:
            raise UserError(f'--{flag.name} is missing; give --{flag.name}=…') from None
        choices = ['true', 'false'] if flag.boolean else getattr(flag.parser, 'enum_values', [])
        wanted = flag.parser.syntactic_help or ' or '.join(choices)
        raise UserError(f'--{flag.name} is {given!r}; it takes {wanted}') from error
    except UnicodeDecodeError as error:
        raise UserError('the --flagfile is not UTF-8') from error


def _take_overrides(arguments: list[str]) -> list[str]:
    """Move `--config.KEY=VALUE` from the arguments to `_overrides`; return the others."""
    words, others = iter(arguments), []
    for word in words:
        if word == '--':
            return [*others, word, *words]
        dashed, equals, text = word.partition('=')
        is_flag = re.fullmatch(r'--?(no)?config\.(.*)', dashed, re.DOTALL)
        if not is_flag or 'config' not in flags.FLAGS:
            others.append(word)
            continue
        off, path = is_flag.groups()
        kind = field_at(cfg.Config(), path).type
        if off and (equals or kind is not bool):
            raise UserError(f'{word} is not a flag; write --config.{path}=VALUE')
        if not equals:
            text = str(not off) if kind is bool else next(words, '')
        _overrides[path] = from_text(path, kind, text)
    return others


def _refuse(word: str, arguments: list[str]) -> NoReturn:
    """Raise the error for a word that nothing reads, with what was perhaps meant."""
    before = arguments[arguments.index(word) - 1] if word in arguments[1:] else ''
    hint = 'leave it out'
    if before.startswith('--') and before != '--' and '=' not in before:
        hint = f'write {before}={word}'
    elif '--' in arguments and word.startswith('-'):
        hint = 'leave out the --, after which words are not flags'
    elif '=' in word:
        hint = f'write --{word}'
    raise UserError(f'nothing reads {word!r}; {hint}')


def start(threads: int = 0) -> Any:
    """Prepare the process for JAX and check that it computes right; return the settings."""
    runtime.configure(threads)  # before JAX is imported

    from cnn_jax.train.run import start

    return start(threads)
