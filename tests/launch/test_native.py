"""Training with the native convolutions, and without."""

import json

import numpy as np
import pytest


def test_a_run_without_the_library_is_equal_up_to_rounding_and_says_so(launch, tiny, tmp_path):
    runs = {switch: tmp_path / switch for switch in '10'}
    printed = {
        switch: launch('train', *tiny, f'--workdir={folder}', check=0, CNN_JAX_NATIVE=switch).stdout
        for switch, folder in runs.items()
    }
    assert 'native convolutions' in printed['1']
    assert "XLA's convolutions (CNN_JAX_NATIVE=0)" in printed['0']
    records = [
        [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        for folder in runs.values()
    ]
    for one, other in zip(*records, strict=True):
        assert one['loss'] == pytest.approx(other['loss'], rel=1e-4)  # after 90 steps of Adam
    steps = [np.fromfile(folder / 'steps.f32', np.float32) for folder in runs.values()]
    first = slice(0, 2)
    np.testing.assert_allclose(steps[0][first], steps[1][first], rtol=2e-6)
    machines = [json.loads((runs[s] / 'manifest.json').read_text())['machine'] for s in '10']
    assert machines[1]['convolutions'] == 'XLA'
    assert machines[0]['convolutions'] in printed['1']
    again = launch('train', *tiny, f'--workdir={runs["1"]}', check=0, CNN_JAX_NATIVE='0')
    assert f'convolutions: {machines[0]["convolutions"]} → XLA' in again.stdout
