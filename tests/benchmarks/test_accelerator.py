"""The table of a GPU or TPU, made on whatever is here."""

import copy
import sys

from benchmarks import accelerator


def test_every_contender_has_a_row_without_tfds_and_grain(tiny, monkeypatch):
    monkeypatch.setattr(accelerator.workloads, 'step_problem', lambda *_: copy.deepcopy(tiny))
    for name in ('tensorflow_datasets', 'grain'):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    monkeypatch.setattr(accelerator, 'STEPS', 1)
    monkeypatch.setattr(accelerator, 'WARM', 1)
    monkeypatch.setattr(accelerator, 'ROUNDS', 1)
    rows = list(accelerator.compared('small28', 2, 'bfloat16', peak=1e12, together=2))
    assert [row[3] for row in rows] == ['cnn_jax', 'Flax', 'cnn_jax, 2 runs together']
    assert all(float(row[4].split()[0]) > 0 for row in rows)
    assert rows[1][5] == '1.00 [1.00–1.00]'
