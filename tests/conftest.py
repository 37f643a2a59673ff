"""Set-up of the whole suite: the runtime settings that every launcher applies."""

import os

os.environ.setdefault('KERAS_BACKEND', 'jax')
# Many tests compile the same step: all but the first then find it.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import pytest
from hypothesis import HealthCheck, settings

from cnn_jax import runtime
from cnn_jax.files import cache_folder
from tests.browser import Browser, Missing

# Tests that start processes with a cache of their own need not build the library for each.
os.environ.setdefault('CNN_JAX_NATIVE', str(cache_folder() / 'native'))
runtime.configure()
settings.register_profile(
    'suite',
    deadline=None,  # a busy machine is not a failure
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile('suite')

LEFT_OUT = pytest.StashKey[list[str]]()

# Long files of few tests, which workers would otherwise begin last.
FIRST = (
    *('test_answers', 'faults/', 'scale/', 'benchmarks/', 'launch/', 'tools/test_verify'),
    *('ablation/test_training', 'test_unread', 'nn/test_peers', 'train/test_loop'),
)


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that no worker ends long after the others."""

    def rank(item):
        path = item.path.as_posix().partition('/tests/')[2]
        return next((i for i, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))

    items.sort(key=rank)


@pytest.fixture
def xla_convolutions(monkeypatch):
    """Convolutions of XLA, whose work it counts, in the place of the native library's."""
    import jax  # after runtime.configure

    from cnn_jax.nn import native

    monkeypatch.setattr(native, 'available', lambda: False)
    jax.clear_caches()  # of what was lowered before
    yield
    jax.clear_caches()


@pytest.fixture(scope='session')
def browser(tmp_path_factory):
    """A headless browser."""
    try:
        browser = Browser(tmp_path_factory.mktemp('browser'))
    except Missing as error:
        pytest.skip(str(error))
    yield browser
    browser.quit()


def pytest_sessionfinish(session):
    """Under CI=true, a test that could not be tried is a failure."""
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    skipped = reporter.stats.get('skipped', []) if reporter else []
    reasons = [report.longrepr[2].removeprefix('Skipped: ') for report in skipped]
    session.config.stash[LEFT_OUT] = [f'{r} ({reasons.count(r)} tests)' for r in {*reasons}]
    if reasons and os.environ.get('CI') == 'true' and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config):
    """Say last what could not be tried."""
    if reasons := config.stash.get(LEFT_OUT, []):
        print('NOT TRIED:', '; '.join(sorted(reasons)))
