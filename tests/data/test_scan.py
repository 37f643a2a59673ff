import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data import decode as scan
from cnn_jax.data.decode import Finding, remember, remembered, skipped
from cnn_jax.errors import UserError

GOOD = Finding(2, 2, 1, '', '')
BAD = Finding(0, 0, 0, 'cut off', '')


def test_the_finding_of_an_image():
    file = io.BytesIO()
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(file, 'PNG')
    data = file.getvalue()
    assert scan.scan(data) == Finding(3, 5, 3, '', hashlib.sha256(data).hexdigest())
    damaged = scan.scan(data[:45])
    assert damaged[:3] == (0, 0, 0)
    assert damaged.reason


def test_up_to_the_limit_images_are_skipped():
    paths = [f'{i}.png' for i in range(200)]
    findings = [BAD if i in (3, 7) else GOOD for i in range(200)]
    assert skipped('set', paths, findings, 0.01) == (('3.png', 'cut off'), ('7.png', 'cut off'))
    assert skipped('set', paths, [GOOD] * 200, 0.0) == ()
    assert skipped('set', [], [], 0.0) == ()


def test_more_than_the_limit_is_an_error():
    paths = [f'{i}.png' for i in range(299)]
    findings = [BAD if i < 3 else GOOD for i in range(299)]
    with pytest.raises(UserError) as caught:
        skipped('set', paths, findings, 0.01)
    assert str(caught.value) == (
        '3 of the 299 images of set cannot be read (0.png: cut off; 1.png: cut off; '
        '2.png: cut off); replace or remove them, or raise --config.data.max_corrupt from 0.01'
    )


def test_the_limit_itself_is_allowed():
    for percent in range(101):  # 0.29 · 100 is less than 29
        findings = [BAD] * percent + [GOOD] * (100 - percent)
        assert len(skipped('set', ['x'] * 100, findings, float(f'{percent}e-2'))) == percent


def test_rows_are_remembered_until_the_rule_changes(monkeypatch):
    assert remembered('key') == []
    remember('key', [(1, GOOD), (2, BAD)])
    assert [(k, Finding(*found)) for k, found in remembered('key')] == [(1, GOOD), (2, BAD)]
    monkeypatch.setattr(scan, 'RULE', scan.RULE + 1)
    assert remembered('key') == []


def test_a_damaged_memory_is_forgotten(cache_dir):
    remember('key', [1, 2])
    (path,) = cache_dir.rglob('*.json')
    path.write_bytes(path.read_bytes()[:-2])
    assert remembered('key') == []
