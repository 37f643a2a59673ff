"""Own components of a run: a model, data, an optimizer or regularizers that the user brings.

They come from `cnn_jax.fit(config, workdir, model=…)` or from an experiment file, which may define,
beside `get_config`,

  def model(config, num_classes): ...   # a Flax module
  def source(config, split): ...        # a `Source`, or (images, labels); split is train or eval
  def optimizer(config): ...            # an Optax transformation
  REGULARIZERS = [...]                  # `Regularizer` objects

Their source code is digested into the config (its field `own`), so runs of different code are
never mixed. An experiment file is executed: open only those that you trust.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax.config import OWN, Config, replace
from cnn_jax.errors import UserError, nearest

# The folders of installed packages, of Python and of this package.
PATHS = (sysconfig.get_paths()[key] for key in ('purelib', 'platlib', 'stdlib'))
LIBRARIES = (*PATHS, str(Path(__file__).parent), '<frozen')
FUNCTIONS = 'model', 'source', 'optimizer'


@dataclass(frozen=True)
class Components:
    """Own parts of a run; None and () stand for what the config names, '' for no experiment file.

    Numbers of the config that `model` and `optimizer` are given may be traced.
    """

    model: Callable[[Config, int], Any] | None = None
    source: Callable[[Config, str], Any] | None = None
    optimizer: Callable[[Config], Any] | None = None
    regularizers: tuple[Any, ...] = ()
    experiment: str = ''

    def mark(self, config: Config) -> Config:
        """Return the config with `own` where these components stand, and with their digest."""
        brought = {
            'model.name': self.model,
            'data.source': self.source,
            'optimizer.name': self.optimizer,
        }
        for path, component in brought.items():
            if component is None and cfg.get(config, path) == OWN:
                raise UserError(
                    f'config.{path} is {OWN}, but none is given; give it to fit, or use the '
                    'experiment file that defines it'
                )
        names = {path: OWN for path, component in brought.items() if component}
        return replace(config, {**names, 'own': self.digest})

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each component: of its source code and the values that it closes over."""
        parts = {name: getattr(self, name) for name in (*FUNCTIONS, 'regularizers')}
        return {
            name: hashlib.sha256('\n'.join(describe(part)).encode()).hexdigest()
            for name, part in parts.items()
            if part not in (None, ())
        }

    @property
    def digest(self) -> str:
        """SHA-256 of all components; '' for none."""
        digests = self.digests
        return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest() if digests else ''

    def unread(self, config: Config) -> list[str]:
        """Settings of which the code of an own model or optimizer says nothing, a phrase each."""
        phrases = []
        for group, part in (('model', self.model), ('optimizer', self.optimizer)):
            code = '' if isinstance(part, _Constant) else '\n'.join(describe(part))
            for name, f in cfg.fields_by_path(getattr(config, group)).items() if part else ():
                value = cfg.get(config, f'{group}.{name}')
                says = f.metadata.get('kept') or re.search(rf'\b{name}\b', code)
                if value != f.default and not says:
                    phrases.append(
                        f'config.{group}.{name} is {value}, but your own {group} does not read it'
                    )
        return phrases

    @property
    def facts(self) -> dict[str, Any]:
        """The components as the manifest keeps them."""
        return {'digests': self.digests, 'experiment': self.experiment}


def from_objects(
    model: Any = None,
    train: Any = None,
    eval: Any = None,
    optimizer: Any = None,
    regularizers: Sequence[Any] = (),
) -> Components:
    """Components from what Python code has at hand; arguments as of `cnn_jax.fit`."""
    import flax.linen as nn

    if (train is None) != (eval is None):
        raise UserError('give both train and eval, or none of them for the data of the config')
    return Components(
        model=_Constant(model) if isinstance(model, nn.Module) else model,
        source=None if train is None else _Splits(train, eval),
        optimizer=_Constant(optimizer) if hasattr(optimizer, 'update') else optimizer,
        regularizers=_listed(regularizers, 'regularizers'),
    )


def _listed(regularizers: Any, where: str) -> tuple[Any, ...]:
    """Regularizers as a tuple; UserError if they are anything else."""
    found = regularizers if isinstance(regularizers, (list, tuple)) else [regularizers]
    if not all(hasattr(each, 'term') and hasattr(each, 'is_on') for each in found):
        raise UserError(f'{where} must be a list of cnn_jax.Regularizer(…)')
    return tuple(found)


NO_COMPONENTS = Components()


def one_of(components: Components | None, *objects: Any) -> Components:
    """The components, or those that `from_objects` makes of the objects; a UserError of both."""
    made = from_objects(*objects)
    if components and made != NO_COMPONENTS:
        raise UserError('own parts are given as components and one by one; give them in one way')
    return components or made


@dataclass(frozen=True)
class _Constant:
    """A function that returns the same object for every config."""

    value: Any

    def __call__(self, *_: Any) -> Any:
        return self.value


@dataclass(frozen=True)
class _Splits:
    """The two splits; their content is in the data's fingerprints, not in the digest."""

    train: Any = dataclasses.field(metadata={'digested': False})
    eval: Any = dataclasses.field(metadata={'digested': False})

    def __call__(self, config: Config, split: str) -> Any:
        return self.train if split == 'train' else self.eval


def load_experiment(path: str | Path) -> types.ModuleType:
    """Execute an experiment file, once a process; what it raises is a UserError with the line."""
    path = Path(path)
    name = f'experiment_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}'
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise UserError(f'{path}: there is no such file')
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f'{path} is not a Python file; its name must end in .py')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with blamed_on(path):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    return module


class Blamed(UserError):
    """An error of the user's code that says where it is."""


@contextlib.contextmanager
def blamed_on(what: object) -> Iterator[None]:
    """Turn what the user's code raises into a `UserError` that names its last line, else `what`.

    Nothing is done where `what` is None: the code is not the user's.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if what is None or isinstance(error, Blamed):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        places = [
            (f.filename, f.lineno)
            for f in frames
            if not f.filename.startswith(LIBRARIES)
            and (f.filename, f.name) != ('<string>', '__init__')  # of a dataclass
        ]
        text = str(error).partition('\n')[0]
        told = f'{type(error).__name__}: {text}'.removesuffix(': ')
        if isinstance(error, SyntaxError):
            told = f'SyntaxError: {error.msg}'
            if error.filename == str(what):
                places = [(error.filename, error.lineno)]
        elif isinstance(error, SystemExit):
            told = 'it ends the program'
        elif isinstance(error, UserError):
            told = str(error)
        where = '{}, line {}'.format(*places[-1]) if places else what
        if found := re.search(r"unexpected keyword argument '(\w+)'", told):
            told += nearest(found[1], [path.rpartition('.')[2] for path in cfg.to_flat(Config())])
        raise Blamed(f'{where}: {told}') from error


def get_config(path: str | Path) -> Config:
    """The config of an experiment file; errors as for `load_experiment`."""
    module = load_experiment(path)
    function = getattr(module, 'get_config', None)
    if not callable(function):
        raise UserError(f'{path} has no function get_config(); an experiment file needs one')
    with blamed_on(Path(path)):
        config = function()
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f'{path}: get_config() returns a {kind}; it must return a cnn_jax.Config')
    return config


def from_experiment(path: str | Path) -> Components:
    """The components that an experiment file defines; errors as for `load_experiment`."""
    module = load_experiment(path)
    functions: dict[str, Any] = {name: getattr(module, name, None) for name in FUNCTIONS}
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise UserError(
                f'{path}: {name} is not a function; define it as `def {name}(config, …)`'
            )
    regularizers = _listed(getattr(module, 'REGULARIZERS', ()), f'{path}: REGULARIZERS')
    brings = Components(regularizers=regularizers, **functions)
    if brings == NO_COMPONENTS:
        return brings
    return dataclasses.replace(brings, experiment=str(Path(path).resolve()))


def reopened(
    config: Config, manifest: dict[str, Any], components: Components = NO_COMPONENTS
) -> Components:
    """The components of a run that is opened again: those given, else the manifest's experiment's.

    Errors:
        UserError: They are missing, or their code is not that of the run.
    """
    facts = manifest.get('own', {'digests': {}, 'experiment': ''})
    if components == NO_COMPONENTS and Path(facts['experiment'] or '.').is_file():
        components = from_experiment(facts['experiment'])
    for name, digest in components.digests.items():
        if facts['digests'].get(name) != digest:
            raise UserError(
                f'the code of the {name} is not what the run began with; restore it'
                f'{" in " + components.experiment if components.experiment else ""}'
            )
    if config.model.name == OWN and components.model is None:
        raise UserError(
            'the run has a model of its own, which its work directory does not hold; give it as '
            'load_run(workdir, model=…)'
        )
    return components


def describe(thing: Any, seen: dict[int, Any] | None = None) -> Iterator[str]:
    """The parts of a thing, as lines of text that are the same in every process.

    Code of the user is described by its source, with what it refers to; code of installed
    libraries by its name; containers, dataclasses and closures by what they hold.
    """
    seen = {} if seen is None else seen
    if isinstance(thing, (bool, int, float, complex, str, bytes, type(None), types.EllipsisType)):
        yield repr(thing)
    elif id(thing) in seen:
        yield 'again'
    elif hasattr(thing, '__array__') and hasattr(thing, 'dtype') and hasattr(thing, 'shape'):
        import numpy as np

        kind = str(thing.dtype)
        if kind.startswith('key<'):  # random keys
            import jax

            yield kind
            thing = jax.random.key_data(thing)
        array = np.asarray(thing)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        yield f'array {array.dtype} {array.shape} {digest}'
    else:
        seen[id(thing)] = thing  # kept alive: no later object may have its id
        yield from _describe_object(thing, seen)


def _describe_object(thing: Any, seen: dict[int, Any]) -> Iterator[str]:
    if isinstance(thing, dict):
        for key in sorted(thing, key=repr):
            yield repr(key)
            yield from describe(thing[key], seen)
    elif isinstance(thing, (list, tuple)):
        yield f'{type(thing).__name__} of {len(thing)}'
        for each in thing:
            yield from describe(each, seen)
    elif isinstance(thing, (set, frozenset)):
        yield repr(sorted(map(repr, thing)))
    elif isinstance(thing, types.FunctionType):
        yield from _describe_function(thing, seen)
    elif isinstance(thing, types.MethodType):
        yield from describe((thing.__self__, thing.__func__), seen)
    elif isinstance(thing, type):
        yield f'{thing.__module__}.{thing.__qualname__}'
        if not _is_installed(thing):
            yield _source(thing)
            for member in vars(thing).values():
                member = getattr(member, '__func__', getattr(member, 'fget', member))
                if isinstance(member, types.FunctionType):
                    yield from describe(member, seen)
            for base in thing.__bases__:
                if not _is_installed(base):
                    yield from describe(base, seen)
    elif hasattr(thing, 'func') and hasattr(thing, 'keywords'):  # functools.partial
        yield from describe((thing.func, thing.args, thing.keywords), seen)
    elif dataclasses.is_dataclass(thing):
        yield from describe(type(thing), seen)
        for f in dataclasses.fields(thing):
            if f.metadata.get('digested', True) and f.name not in ('parent', 'name'):
                yield f.name
                yield from describe(getattr(thing, f.name), seen)
    elif isinstance(thing, types.ModuleType):
        yield f'module {thing.__name__}'
        if not _is_installed(thing):
            yield _source(thing)
    else:
        yield f'{type(thing).__module__}.{type(thing).__qualname__}'
        yield from describe(getattr(thing, '__dict__', {}), seen)


def _describe_function(function: types.FunctionType, seen: dict[int, Any]) -> Iterator[str]:
    yield f'{function.__module__}.{function.__qualname__}'
    yield from describe((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        yield from describe(cell.cell_contents, seen)
    if _is_installed(function):
        return
    yield _source(function)
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name
            yield from describe(function.__globals__[name], seen)


def _names(code: types.CodeType) -> list[str]:
    """Names of the globals that code and the code inside it may refer to."""
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return sorted({*code.co_names, *inner})


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed into an interpreter
        code = getattr(thing, '__code__', None)
        return f'{code.co_code.hex()} {code.co_names}' if code else repr(thing)


def _is_installed(thing: Any) -> bool:
    """Return whether code is a library's (or this package's), whose version the manifest keeps."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__
    if name.partition('.')[0] in ('cnn_jax', *sys.stdlib_module_names):
        return name != '__main__'
    return str(getattr(sys.modules.get(name), '__file__', None)).startswith(LIBRARIES[:2])
