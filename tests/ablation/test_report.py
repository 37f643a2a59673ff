"""The report as a reader sees it: in Chromium, on a phone and a desk, in light and in dark."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.ablation import figures
from cnn_jax.ablation.report import Ablation
from cnn_jax.errors import UserError

FIGURES = ('forest', 'curves_accuracy', 'curves_loss', 'gap')
HOSTILE = '<script>alert(1)</script>'

# Elements that reach beyond the page, or SVG text that reaches beyond its figure.
OVERFLOWING = """
const wide = [...document.querySelectorAll('main *')].filter(e =>
    !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1);
const cut = [...document.querySelectorAll('svg text')].filter(e => {
    const [t, s] = [e.getBoundingClientRect(), e.closest('svg').getBoundingClientRect()];
    return t.left < s.left - 1 || t.right > s.right + 1 || t.bottom > s.bottom + 1;
});
return [...wide, ...cut].map(e => e.tagName + ': ' + e.textContent.slice(0, 40));
"""


@pytest.mark.parametrize(('width', 'theme'), [(390, 'light'), (390, 'dark'), (1280, 'dark')])
def test_report_is_readable(browser, ablation, change_result, width, theme):
    """With names that are long, or meant to break it."""
    names = ('none', HOSTILE, 'a' * 60, '$x_1$ "quoted" & more', 'dropout, batch norm and L2')
    gains = {name: 0.02 * i for i, name in enumerate(names)}
    folder = ablation(gains, question=f'{HOSTILE}?\n\n{HOSTILE * 9}', command=HOSTILE)
    change_result(folder, '2-1', status='failed', reason=HOSTILE)
    media = {'features': [{'name': 'prefers-color-scheme', 'value': theme}]}
    size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', media)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    browser.get(Ablation(folder).write_report().as_uri())
    assert browser.get_log('browser') == []
    assert browser.execute_script('return document.documentElement.scrollWidth') <= width
    assert browser.execute_script(OVERFLOWING) == []
    for name in FIGURES:
        assert browser.find_element('css selector', f'#{name} svg').size['width'] > 300
    assert browser.find_elements('css selector', 'script') == []
    assert HOSTILE in browser.find_element('css selector', '.verdicts').text


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_colours_have_wcags_contrast(theme):
    """WCAG 2.1: 4.5 between text and what is behind it; the first colours are the light theme's."""

    def luminance(colour):
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    css = (Path(figures.__file__).parent / 'report.css').read_text()
    found = re.findall(r'--(\w+): (#\w{6})', css)
    colours = dict(found[:8] if theme == 'light' else found[8:])
    assert theme == 'dark' or colours.items() >= figures.COLOURS.items()
    for name in ('ink', 'muted', 'blue', 'orange'):
        for behind in ('surface', 'page'):
            light, dark = sorted(map(luminance, (colours[name], colours[behind])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, behind)


def test_report_says_what_it_rests_on_and_needs_no_network(ablation):
    folder = ablation(question='What?\n\nOn digits.\n\nAnswer (n = 5): none.\n\nOn garments: none.')
    text = ' '.join(Ablation(folder).write_report().read_text().split())
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s)>]*)', text)
    assert {link for link in links if not link.startswith(('#', 'data:'))} == set()
    assert 'mnist_5k: train[:500] to train, test to test' in text
    assert 'On digits.' in text
    assert 'On garments' not in text  # the answer of an earlier run
    for sentence in Ablation(folder).verdicts.values():
        assert sentence.split(': ', 1)[1][:30] in text


def test_report_of_little_claims_nothing(ablation):
    folder = ablation(seeds=1)
    text = Ablation(folder).write_report().read_text()
    assert 'No claim can be made with fewer than 2 seeds' in text
    assert 'Tests against' not in text
    for path in (folder / 'cells').iterdir():
        path.unlink()
    assert Ablation(folder).write_report().read_text().count('has not run') == 5


def test_report_of_a_grid_shows_its_effects(ablation):
    arms = {f'{a}{b}': {'changes': {}, 'levels': {'a': a, 'b': b}} for a in (0, 1) for b in (0, 1)}
    gains = {'00': 0.0, '01': 0.05, '10': 0.02, '11': 0.1}
    folder = ablation(gains, arms=arms, factors={'a': [0, 1], 'b': [0, 1]})
    text = Ablation(folder).write_report().read_text()
    for effect in ('a=1', 'b=1', 'a=1 × b=1'):
        assert f'<th scope="row">{effect}</th>' in text


def test_the_same_results_give_the_same_files(ablation):
    folder = ablation()
    names = ['report.html', 'summary.json', 'summary.csv', 'cost.json']
    names += [f'figures/{name}.{kind}' for name in FIGURES for kind in ('svg', 'png')]
    Ablation(folder).write_report()
    first = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    Ablation(folder).write_report()
    assert {name: (folder / name).read_bytes() for name in names} == first


def test_summary_json_is_strict_json(ablation, change_result):
    folder = ablation()
    result = json.loads((folder / 'cells' / '1-0.json').read_text())
    result['curves'][0]['loss'] = result['metrics']['train']['loss'] = float('nan')
    change_result(folder, '1-0', **result)
    Ablation(folder).write_report()
    text = (folder / 'summary.json').read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary['arms']['dropout']['train']['loss']['mean'] is None


def test_figures_hold_text_in_the_pages_colours(ablation):
    summary = Ablation(ablation({'none': 0.0, 'a < $b$ & c': 0.05})).summary
    for name, figure in figures.draw(summary).items():
        assert figure['png'].startswith(b'\x89PNG')
        assert 'a < $b$ & c' in ''.join(ET.fromstring(figure['svg']).itertext())
        assert re.findall(r'#[0-9a-fA-F]{6}\b', figures.themed(figure['svg'], name)) == []


DIGITS = {'data.source': 'mnist_5k', 'data.train': 'train[:500]'}
GARMENTS = {'data.source': 'idx:/data/fashion-mnist', 'data.train': 'train'}
GAINS = {'none': 0.0, 'A': 0.05, 'B': -0.03}


@pytest.fixture
def write(write_ablation, tmp_path):
    """Writes an ablation on some data into a folder of its own."""

    def call(folder, data, gains=GAINS, **changes):
        configs = {'configs': dict.fromkeys(gains, data)}
        return write_ablation(tmp_path / folder, gains, **configs, **changes)

    return call


def test_side_by_side_has_a_block_for_each_experiment_and_a_column_for_each_data_set(write):
    def means(axes):
        """The markers that stand on whole rows, from the top down."""
        points = [line.get_xydata() for line in axes.lines if line.get_marker() in 'oD']
        return [float(x) for ((x, _),) in sorted(points, key=lambda point: point[0][1])]

    folders = [
        write('a', DIGITS, name='noise'),
        write('b', DIGITS, name='penalties'),
        write('c', GARMENTS, {'none': 0.0, 'B': 0.02, 'C': 0.04}, name='noise'),
    ]
    noise, noise_on_garments, penalties, empty = figures.draw_side_by_side(folders).axes
    assert noise.get_title() == 'mnist_5k train[:500]'
    assert noise_on_garments.get_title() == 'fashion-mnist train'
    assert [axes.get_title('left') for axes in (noise, penalties)] == ['noise', 'penalties']
    assert [label.get_text() for label in noise.get_yticklabels()] == ['A', 'B', 'C']
    assert not means(empty)
    for axes, folder in zip((noise, penalties, noise_on_garments), folders):
        rows = Ablation(folder).table[1:]
        np.testing.assert_allclose(means(axes), [100 * row['difference'] for row in rows])


def test_ablations_that_cannot_stand_side_by_side_are_refused(write):
    folders = [write('a', DIGITS), write('b', DIGITS), write('c', GARMENTS, metric='loss')]
    with pytest.raises(UserError, match='second ablation'):
        figures.draw_side_by_side(folders[:2])
    with pytest.raises(UserError, match='metrics differ'):
        figures.draw_side_by_side(folders[1:])
