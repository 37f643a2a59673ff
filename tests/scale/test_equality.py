"""Training over several devices and processes is training on one."""

import pytest

from tests.scale import layouts

pytestmark = pytest.mark.slow

ROUNDING = 1e-5  # of float32: sums over a batch have another order on other layouts

LAYOUTS = {
    '8 devices': {'devices': 8},
    '8 devices, parameters divided': {'devices': 8, 'fsdp': True},
    '8 devices, matrices halved': {'devices': 8, 'model': 2},
    '2 processes': {'processes': 2},
    '4 processes of 2 devices': {'processes': 4, 'devices': 2},
}
CASES = [
    *(('strided', layout) for layout in ('8 devices', '2 processes', '4 processes of 2 devices')),
    *(('vgg16', layout) for layout in LAYOUTS),
    ('ghost', '8 devices'),
    ('ghost', '2 processes'),
]


@pytest.fixture(scope='module')
def on_one_device(tmp_path_factory):
    """The file that a config's run on one device wrote, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = layouts.train(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize(('name', 'layout'), CASES)
def test_fifty_steps_are_those_of_one_device(on_one_device, tmp_path, name, layout):
    one = on_one_device(name)
    several = layouts.train(name, tmp_path, states=one, **LAYOUTS[layout])
    apart = layouts.differences(one, several)
    assert apart['order'] == 0
    assert apart['mask'] == 0
    assert apart['objective'] < ROUNDING
    assert apart['update'] < ROUNDING
    if name != 'ghost':  # groups of five: their statistics amplify rounding
        assert apart['free state'] < ROUNDING
        assert apart['free objective'] < ROUNDING
        assert apart['evaluation loss'] < ROUNDING
        assert apart['moved'] == 0
    if name == 'vgg16':
        shares = {'8 devices, parameters divided': 1 / 8, '8 devices, matrices halved': 1 / 2}
        assert apart['share'] == shares.get(layout, 1)
