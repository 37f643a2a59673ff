"""The report as a reader sees it: in Chromium, on a phone and a desk, in light and in dark."""

import csv
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.ablation import figures
from cnn_jax.ablation.report import Ablation
from cnn_jax.ablation.results import AGAIN, FLOOR
from cnn_jax.errors import UserError
from cnn_jax.tools import page as pages
from cnn_jax.tools.figures import COLOURS, themed
from tests.browser import ILLEGIBLE

FIGURES = ('forest', 'response', 'curves_accuracy', 'curves_loss')
HOSTILE = '<script>alert(1)</script>'
CONTROLS = 'red \x1b[31m \u202e turned'
COLUMNS = 'arm control measure n mean difference low high p verdict decided failed'

NOT_SHOWN = """
return [...document.querySelectorAll('.decisions td')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.left < 0 || box.right > innerWidth || box.width < 60 || e.closest('.scroll');
}).length;
"""


def fail(reason, *kinds, arm=None):
    """Makes these runs fail."""

    def change(run, result):
        if run.kind not in kinds or arm not in (None, run.arm):
            return result
        lost = {key: result[key] for key in ('classes', 'examples', 'seconds')}
        return lost | {'status': 'failed', 'reason': reason}

    return change


def page(folder):
    return ' '.join(Ablation(folder).write_report().read_text().split())


@pytest.mark.parametrize(('width', 'theme'), [(390, 'light'), (390, 'dark'), (1280, 'dark')])
def test_report_is_readable(browser, ablation, width, theme):
    """With names that are long, or meant to break it, and every verdict in sight."""
    names = ('none', HOSTILE, 'a' * 60, '$x_1$ "quoted" & more', 'dropout, batch norm and L2')
    gains = {name: 0.03 * i for i, name in enumerate(names)}
    folder = ablation(
        gains,
        question=f'{HOSTILE}?\n\n{HOSTILE * 9}',
        command=HOSTILE,
        change=fail(HOSTILE, 'replicate', 'trial', arm='a' * 60),
        curves=True,
    )
    media = {'features': [{'name': 'prefers-color-scheme', 'value': theme}]}
    size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', media)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    browser.get(Ablation(folder).write_report().as_uri())
    assert browser.get_log('browser') == []
    assert browser.execute_script('return document.documentElement.scrollWidth') <= width
    assert browser.execute_script(ILLEGIBLE) == []
    for name in FIGURES:
        assert browser.find_element('css selector', f'#{name} svg').size['width'] > 300
    assert browser.find_elements('css selector', 'script') == []
    shown = ' '.join(browser.find_element('css selector', '.verdicts').text.split())
    for sentence in Ablation(folder).verdicts.values():
        assert ' '.join(sentence.split()) in shown
    assert browser.execute_script(NOT_SHOWN) == 0
    cells = browser.find_elements('css selector', '.decisions td')
    for row, cell in zip(Ablation(folder).table[2:], cells, strict=True):
        assert f'{row["verdict"]} after 5' in cell.text


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_colours_have_wcags_contrast(theme):
    """WCAG 2.1: 4.5 between text and what is behind it; the first colours are the light theme's."""

    def luminance(colour):
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    css = Path(pages.__file__).with_suffix('.css').read_text()
    found = re.findall(r'--(\w+): (#\w{6})', css)
    colours = dict(found[:8] if theme == 'light' else found[8:])
    assert theme == 'dark' or colours.items() >= COLOURS.items()
    for name in ('ink', 'muted', 'blue', 'orange'):
        for behind in ('surface', 'page'):
            light, dark = sorted(map(luminance, (colours[name], colours[behind])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, behind)


def test_report_says_what_it_rests_on_and_needs_no_network(ablation):
    folder = ablation(question='What?\n\nOn digits.')
    text = page(folder)
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s)>]*)', text)
    assert {link for link in links if not link.startswith(('#', 'data:'))} == set()
    assert 'On digits.' in text
    for part in (
        'A replicate draws 200 of 800 training images',
        'for all comparisons (8)',
        '±1 points of accuracy, ±0.05 nats of negative log-likelihood',
        'gave the same bits: an arm that changes nothing differs by exactly 0',
        '<th scope="row">Chance</th><td>10.0</td><td>2.30</td>',
        '<th scope="row">SVM on pixels</th><td>80',
        '4 trials of each arm',
        'the best 3 by each measure are repeated to 4 replicates',
    ):
        assert part in text
    assert 'class="alert"' not in text.partition('</header>')[0]


def better_at_low_rates(run, result):
    if run.kind != 'trial':
        return result
    return result | {'metrics': {'validation': {'loss': run.config.optimizer.learning_rate}}}


def other_bits(run, result):
    return result | {'losses': '00' * 800} if run.kind == AGAIN else result


ALERTS = {
    'runs failed': fail('why', 'replicate', arm='L2'),
    'runs are missing': lambda run, result: result if run.seed != 4 else None,
    'gave other bits': other_bits,
    'at the edge of those tried': better_at_low_rates,
    'There is no SVM on pixels: too many images.': fail('too many images', FLOOR),
}


@pytest.mark.parametrize('alert', ALERTS)
def test_what_makes_an_answer_doubtful_is_said(ablation, alert):
    assert alert in page(ablation(change=ALERTS[alert]))


def test_an_arm_that_moved_nothing_is_marked(ablation):
    text = page(ablation({'none': 0.0, 'idle': 0.0, 'busy': 0.1}, spread=1e-6))
    rows = re.findall(r'<tr>.*?</tr>', text.partition('What the arms did')[2])
    assert ['moved nothing' in row for row in rows[1:4]] == [False, True, False]


@pytest.mark.parametrize(
    'kinds', [('replicate',), ('trial',), ('replicate', 'trial', FLOOR, AGAIN)]
)
def test_reports_are_written_of_whatever_failed(ablation, kinds):
    text = page(ablation(change=fail('why it is so', *kinds)))
    assert text.count('why it is so') >= 25


def test_report_of_little_claims_nothing(ablation):
    folder = ablation(seeds=1)
    text = page(folder)
    assert text.count('no claim before 2 replicates') == 4
    assert 'Else undecided' not in text
    for path in (folder / 'cells').iterdir():
        path.unlink()
    assert 'has not run' in page(folder)


def test_report_of_one_arm_compares_nothing(ablation):
    assert 'There is one arm' in page(ablation({'none': 0.0}, tune={}, trials=None))


def test_report_of_a_grid_shows_its_effects(ablation):
    factors = {
        'a': {'0': {}, '1': {'model.dropout': 0.1}},
        'b': {'0': {}, '1': {'loss.l2': 0.1}},
    }
    text = page(ablation({'0, 1': 0.05, '1, 0': 0.02, '1, 1': 0.1}, factors=factors, seeds=6))
    effects = text.partition('Effects of the factors')[2].partition('</table>')[0]
    for effect in ('a=1', 'b=1', 'a=1 × b=1'):
        assert f'<th scope="row">{effect}</th>' in effects


def test_the_same_results_give_the_same_files(ablation):
    folder = ablation(curves=True)
    names = ['report.html', 'summary.json', 'summary.csv', 'cost.json']
    names += [f'figures/{name}.{kind}' for name in FIGURES for kind in ('svg', 'png')]
    Ablation(folder).write_report()
    first = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    Ablation(folder).write_report()
    assert {name: (folder / name).read_bytes() for name in names} == first


def test_names_are_harmless_wherever_they_are_written(ablation):
    """Control characters, a spreadsheet's formulas, markup."""
    gains = {'=1+1': 0.0, '@SUM(A1)': 0.05, f'{HOSTILE}&amp;': 0.0}
    text = {'question': CONTROLS, 'command': CONTROLS, 'name': CONTROLS}
    folder = ablation(gains, change=fail(CONTROLS, FLOOR), **text)
    result = Ablation(folder)
    result.write_report()
    rows = list(csv.reader((folder / 'summary.csv').read_text().splitlines()))
    assert rows[0] == COLUMNS.split()
    assert [row[0] for row in rows[1::2]] == ["'=1+1", "'@SUM(A1)", f'{HOSTILE}&amp;']
    for written in (repr(result), (folder / 'report.html').read_text()):
        assert '\x1b' not in written
        assert '\u202e' not in written
    assert HOSTILE not in (folder / 'report.html').read_text()
    for path in (folder / 'figures').glob('*.svg'):
        assert HOSTILE[:16] in ''.join(ET.fromstring(path.read_text()).itertext())


def test_summary_json_is_strict_json(ablation):
    """Equal differences say nothing of others: their interval has no end."""

    def equal(run, result):
        if run.kind != 'replicate':
            return result
        right = np.arange(400) < (200 if run.arm == 'none' else 300)
        result['metrics']['test'] |= {'accuracy': float(right.mean())}
        return result | {'correct': np.packbits(right).tobytes().hex()}

    folder = ablation({'none': 0.0, 'x': 0.0}, change=equal)
    compared = Ablation(folder).summary['arms']['x']['compared']['accuracy']
    assert not math.isfinite(compared['high'])
    Ablation(folder).write_report()
    text = (folder / 'summary.json').read_text()
    summary = json.loads(text, parse_constant=pytest.fail)
    assert summary['arms']['x']['compared']['accuracy']['high'] is None
    assert 'inf' not in (folder / 'summary.csv').read_text()


def test_figures_hold_text_in_the_pages_colours(ablation):
    summary = Ablation(ablation({'none': 0.0, 'a < $b$ & c': 0.05}, curves=True)).summary
    drawn = figures.draw(summary)
    assert tuple(drawn) == FIGURES
    for name, figure in drawn.items():
        assert figure['png'].startswith(b'\x89PNG')
        assert 'a < $b$ & c' in ''.join(ET.fromstring(figure['svg']).itertext())
        assert re.findall(r'#[0-9a-fA-F]{6}\b', themed(figure['svg'], name)) == []


GAINS = {'none': 0.0, 'A': 0.05, 'B': -0.03}


@pytest.fixture
def sizes(write_ablation, tmp_path):
    """Writes an ablation of so many training images into a folder of its own."""

    def call(n, name='', gains=GAINS, **options):
        folder = tmp_path / f'{n}{name}'
        data = {'subset': n, 'train': 'train'} | options.pop('data', {})
        return write_ablation(folder, gains, data=data, **options)

    return call


@pytest.mark.parametrize('measure', ['accuracy', 'loss'])
def test_effects_stand_against_the_number_of_images(sizes, measure):
    folders = [sizes(1000), sizes(200), sizes(200, 'more', {'none': 0.0, 'C': 0.1})]
    figure = figures.draw_against_n(folders, measure)
    drawn = {axes.get_title('left'): axes for axes in figure.axes if axes.get_visible()}
    assert list(drawn) == ['A', 'B', 'C']
    scale = {'accuracy': 100, 'loss': 1}[measure]
    for arm, axes in drawn.items():
        expected = {
            Ablation(folder).summary['counts']['train']: row['difference']
            for folder in folders
            for row in Ablation(folder).table
            if (row['arm'], row['measure']) == (arm, measure)
        }
        points = [
            tuple(line.get_xydata()[0])
            for line in axes.lines
            if line.get_marker() in 'osD' and len(line.get_xydata())
        ]
        assert points == [(n, pytest.approx(scale * expected[n])) for n in sorted(expected)]


def test_a_kept_summary_takes_the_place_of_a_work_directory(sizes):
    folders = [sizes(1000), sizes(200)]
    Ablation(folders[1]).write_report()
    kept = [folders[0], folders[1] / 'summary.json']
    assert figures._effects(kept, 'loss') == figures._effects(folders, 'loss')
    (folders[1] / 'summary.json').write_text('{"primaries": ["loss"]}')
    with pytest.raises(UserError, match='did not write'):
        figures.draw_against_n(kept)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({'name': 'again'}, 'once more'),
        ({'data': {'source': 'digits'}}, 'data source'),
        ({'margins': {'loss': 0.1}}, 'margin'),
        ({'against': {'B': 'A'}}, 'control of B'),
        ({'primaries': ('accuracy',)}, 'does not decide on loss'),
    ],
)
def test_ablations_that_do_not_belong_together_are_refused(sizes, options, match):
    n = 200 if 'name' in options else 400
    with pytest.raises(UserError, match=match):
        figures.draw_against_n([sizes(200), sizes(n, **{'name': 'x', **options})])
