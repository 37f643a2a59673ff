"""The shared parts of the launchers: flags, plain errors, exit codes, the process's set-up.

Exit codes: 0 success, 1 a failed run, 2 a usage error, 75 interrupted after saving, 130
stopped by Ctrl-C before there was anything to save.
"""

import builtins
import io
import os
import sys
import threading
from collections.abc import Callable
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from cnn_jax import config as cfg
from cnn_jax.components import Components, from_experiment
from cnn_jax.errors import RunFailed, UserError, printable

PRINT = print  # as Python has it

OK, FAILED, MISTAKE, STOPPED, INTERRUPTED = 0, 1, 2, os.EX_TEMPFAIL, 130

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
        return cfg.local_path(argument, f'--{self.name}')


def define_path(name: str, text: str, *, required: bool = False, url: bool = False) -> Any:
    """A flag that takes a path; None if it is not given.

    Args:
        name: The flag's.
        text: Its help.
        required: Whether it must be given.
        url: Whether it may be a URL such as gs://BUCKET/RUN.
    """
    return flags.DEFINE(_Path(name, url), name, None, text, required=required)


def define_workdir(text: str, url: bool = False) -> flags.FlagHolder:
    """The --workdir flag, required."""
    return define_path('workdir', text, required=True, url=url)


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


def define_config() -> flags.FlagHolder:
    """The --config=FILE flag with its --config.KEY=VALUE overrides, required."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file(
        'config',
        None,
        'The experiment: a Python file with get_config(). Override any field with '
        '--config.KEY=VALUE, e.g. --config.optimizer.learning_rate=1e-3; '
        'cnn_jax/config.py says what the fields mean.',
    )


def config_file() -> str:
    """The path of the experiment file that --config names."""
    from ml_collections import config_flags

    return config_flags.get_config_filename(flags.FLAGS['config'])


def read_experiment(holder: flags.FlagHolder) -> tuple[cfg.Config, Components]:
    """The validated config of a `define_config` flag, and what its file brings."""
    config = holder.value
    if not isinstance(config, cfg.Config):
        raise UserError('--config is missing; give an experiment file, e.g. experiments/small.py')
    components = from_experiment(config_file())
    return cfg.validate(components.mark(config)), components


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run a launcher's `main` and leave the process with its exit code.

    A `UserError` is one sentence on standard error and exit code 2; any other exception is a
    failed run, exit code 1, with one sentence, too. `--debug` shows the traceback.
    """
    arguments = sys.argv
    for stream in (sys.stdout, sys.stderr):  # file names need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    builtins.print = _print
    debug = any(a in ('--debug', '--debug=true') for a in arguments)
    if {'--help', '-h', '-help'} & set(arguments[1:]):
        print((sys.modules['__main__'].__doc__ or '') + flags.FLAGS.main_module_help())
        print('  --debug: Show the traceback of an error.')
        sys.exit(OK)
    try:
        _check_config_argument(arguments)
        if not debug:
            _quieten()
        app.run(lambda argv: sys.exit(main(argv) or OK), flags_parser=_parse)
    except UserError as error:
        if debug:
            raise
        print(f'error: {printable(error)}', file=sys.stderr)
        _leave(MISTAKE)
    except BrokenPipeError:  # the reader of the output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OK)
    except KeyboardInterrupt:  # before there was anything to save
        print('stopped', file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        print(f'failed: {printable(_sentence(error))}', file=sys.stderr)
        _leave(FAILED)


def _print(*values: object, **options: Any) -> None:
    """`print` for a launcher's whole process: names of files and classes are data, not controls."""
    PRINT(*(printable(value, keep='\n\t') for value in values), **options)


def _leave(code: int) -> None:
    """End the process after an error."""
    if (mesh := sys.modules.get('cnn_jax.mesh')) and mesh.is_initialized():
        mesh.exit_now(code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f'{error.filename}: {error.strerror}; mend that, and the same command goes on'
    if mesh := sys.modules.get('cnn_jax.mesh'):
        return mesh.describe_error(error)
    return f'{type(error).__name__}: {error} (--debug shows where)'


def _quieten() -> None:
    """Let libraries say nothing of their own accord: their errors are raised, and told once."""
    logging.set_verbosity(logging.FATAL)  # Orbax tells of every file, and of all threads that fail
    getLogger('asyncio').setLevel(CRITICAL)

    def tell(failed: threading.ExceptHookArgs) -> None:  # TensorBoard's writer is a thread
        name = failed.thread.name if failed.thread else 'a thread'
        print(f'warning: {name} stopped: {failed.exc_value}', file=sys.stderr)

    usual = sys.unraisablehook

    def left_over(found: Any) -> None:  # TensorStore's threads, after a save that failed
        if str(found.exc_value) != 'Event loop is closed':
            usual(found)

    threading.excepthook, sys.unraisablehook = tell, left_over


def _parse(arguments: list[str]) -> list[str]:
    """Parse the flags; a wrong one is a `UserError`."""
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        if isinstance(error.__context__, UserError):  # of a parser of ours
            raise error.__context__ from None
        raise UserError(f'{error}; --help lists the flags') from error


def _check_config_argument(arguments: list[str]) -> None:
    """Say in our own words what ml_collections would answer with a traceback."""
    known = cfg.fields_by_path(cfg.Config())
    for argument in arguments[1:]:
        name, _, given = argument.lstrip('-').partition('=')
        if name == 'config' and given and not Path(given).is_file():
            raise UserError(f'--config={given}: there is no such file')
        if name.startswith('config.') and name.removeprefix('config.') not in known:
            raise UserError(cfg.unknown_key(name.removeprefix('config.'), known))


def start(threads: int = 0) -> Any:
    """Prepare the process for JAX and check that it computes right; return the settings."""
    from cnn_jax import runtime

    runtime.configure(threads)  # before JAX is imported

    from cnn_jax.train.run import start

    return start(threads)
