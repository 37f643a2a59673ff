"""Training over several devices and processes is training on one."""

import pytest

from tests.scale import layouts
from tests.scale.layouts import LAYOUTS

pytestmark = pytest.mark.slow

ROUNDING = 1e-5  # of float32: sums over a batch have another order on other layouts

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
