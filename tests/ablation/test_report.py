"""The report as a reader sees it: in Chromium, on a phone and a desk, in light and in dark."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from cnn_jax.ablation import figures
from cnn_jax.ablation.report import write_report
from cnn_jax.ablation.summary import summarize

FIGURES = ('forest', 'curves_accuracy', 'curves_loss', 'gap', 'calibration')
SIZES = {'phone': 390, 'desk': 1280}
HOSTILE = '<script>alert(1)</script>'

# WCAG 2.1's contrast of every text with the nearest background that is not transparent.
LOWEST_CONTRAST = """
const channels = c => c.match(/[\\d.]+/g).map(Number);
const light = c => channels(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const background = e => {
    for (; e; e = e.parentElement) {
        const c = getComputedStyle(e).backgroundColor;
        if ((channels(c)[3] ?? 1) > 0) return c;
    }
    return 'rgb(255, 255, 255)';
};
let lowest = [21, ''], texts = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || e.closest('style')) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(e.closest('svg') ? style.fill : style.color), light(background(e))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    texts += 1;
    if (contrast < lowest[0]) lowest = [contrast, text];
}
return [...lowest, texts];
"""

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


def show(browser, page, width=1280, theme='light'):
    browser.execute_cdp_cmd(
        'Emulation.setEmulatedMedia',
        {'features': [{'name': 'prefers-color-scheme', 'value': theme}]},
    )
    browser.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride',
        {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600},
    )
    browser.get(page.as_uri())


@pytest.fixture(scope='module', params=['plain', 'hostile'])
def page(request, write_ablation, change_cell, tmp_path_factory):
    """A report of usual arms, and one of names that are long, or meant to break it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == 'plain':
        return write_report(write_ablation(folder))
    names = ('none', HOSTILE, 'a' * 60, '$x_1$ "quoted" & more', 'dropout, batch norm and L2')
    write_ablation(
        folder,
        {name: 0.02 * i for i, name in enumerate(names)},
        question=f'{HOSTILE}?\n\n{HOSTILE * 9}',
        command=HOSTILE,
        manifest={HOSTILE: HOSTILE},
    )
    change_cell(folder, '2-1', status='failed', reason=HOSTILE)
    return write_report(folder)


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('size', SIZES)
def test_report_is_readable(browser, page, size, theme):
    show(browser, page, SIZES[size], theme)
    assert browser.get_log('browser') == []
    assert browser.execute_script('return innerWidth') == SIZES[size]
    assert browser.execute_script('return document.documentElement.scrollWidth') <= SIZES[size]
    assert browser.execute_script(OVERFLOWING) == []
    contrast, text, texts = browser.execute_script(LOWEST_CONTRAST)
    assert texts > 200
    assert contrast >= 4.5, f'{text!r} has a contrast of {contrast:.2f}'
    for name in FIGURES:
        figure = browser.find_element('css selector', f'#{name} svg')
        assert figure.size['width'] > 300
        assert figure.size['height'] > 100


def test_figures_follow_the_theme(browser, ablation):
    page = write_report(ablation())
    ink = "return getComputedStyle(document.querySelector('#gap svg text')).fill"
    show(browser, page, theme='light')
    light = browser.execute_script(ink)
    show(browser, page, theme='dark')
    assert browser.execute_script(ink) != light


def test_names_are_text_and_nothing_runs(browser, ablation):
    page = write_report(ablation({'none': 0.0, HOSTILE: 0.1}, question=HOSTILE))
    assert HOSTILE not in page.read_text()
    show(browser, page)
    assert browser.find_elements('css selector', 'script') == []
    assert browser.find_element('css selector', 'h1').text == HOSTILE
    assert HOSTILE in browser.find_element('css selector', '.verdicts').text


BREAKERS = (
    '<script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    "'; onload='alert(1)",
    '</title></style></svg></pre>',
    '&lt;b&gt; &#60;b> <!-- ]]> {{ 7 * 7 }} {% raw %}',
)


class Skeleton(HTMLParser):
    """The tags of a page and their attributes, without any text."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, [name for name, _ in attributes]))

    def handle_endtag(self, tag):
        self.tags.append(tag)

    def handle_comment(self, data):
        self.tags.append('comment')


def test_no_name_changes_the_pages_structure(ablation, change_cell):
    """The page has the same tags as with the letters of all names alone."""

    def page(names):
        arms = {
            name: {'changes': {'data.source': name}, 'levels': {name: i % 2, 'b': [name, i // 2]}}
            for i, name in enumerate(names)
        }
        text = ' '.join(names)
        folder = ablation(
            {name: 0.02 * i for i, name in enumerate(names)},
            arms=arms,
            name=text,
            question=f'{text}\n\n{text}\n\n    {text}',
            command=text,
            manifest={'source': text, 'class_names': names, text: text},
            budgets=dict.fromkeys(names, text),
        )
        change_cell(folder, '3-1', status='failed', reason=text)
        return Skeleton(write_report(folder))

    assert page(BREAKERS).tags == page([re.sub('[^a-z0-9 ]', 'x', name) for name in BREAKERS]).tags


def test_report_needs_no_network(ablation):
    text = write_report(ablation()).read_text()
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s)>]*)', text)
    assert links
    assert {link for link in links if not link.startswith(('#', 'data:'))} == set()


def test_report_says_what_five_seeds_cannot_show(ablation):
    text = ' '.join(write_report(ablation()).read_text().split())
    assert 'With 5 pairs the exact sign-flip test cannot give a p below 0.0625' in text
    assert 'it cannot decide at 5%: the paired t test does' in text
    for arm in summarize(ablation())['arms'].values():
        if arm['verdict']:
            assert arm['verdict']['sentence'].split(': ', 1)[1][:30] in text


def test_report_of_one_seed_makes_no_claim(browser, ablation):
    show(browser, write_report(ablation(seeds=1)))
    text = browser.find_element('css selector', 'main').text
    assert 'No claim can be made with fewer than 2 seeds' in text
    assert 'Tests against' not in text


def test_report_of_nothing_finished_says_so(ablation):
    folder = ablation()
    for path in (folder / 'cells').iterdir():
        path.unlink()
    text = write_report(folder).read_text()
    assert '25 of 25 runs are missing' in text
    assert text.count('has not run') == 25


def test_report_of_a_grid_shows_its_effects(ablation):
    arms = {f'{a}{b}': {'changes': {}, 'levels': {'a': a, 'b': b}} for a in (0, 1) for b in (0, 1)}
    gains = {'00': 0.0, '01': 0.05, '10': 0.02, '11': 0.1}
    folder = ablation(gains, arms=arms, factors={'a': [0, 1], 'b': [0, 1]})
    text = write_report(folder).read_text()
    for effect in ('a=1', 'b=1', 'a=1 × b=1'):
        assert f'<th scope="row">{effect}</th>' in text


def test_the_same_cells_give_the_same_files(ablation):
    folder = ablation()
    names = ['report.html', 'summary.json', 'summary.csv', 'summary.tex', 'cost.json']
    names += [f'figures/{name}.{kind}' for name in FIGURES for kind in ('svg', 'png')]
    write_report(folder)
    first = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    write_report(folder)
    assert {name: (folder / name).read_bytes() for name in names} == first


def test_summary_json_is_strict_json(ablation, change_cell):
    folder = ablation()
    cell = json.loads((folder / 'cells' / '1-0.json').read_text())
    cell['curves'][0]['loss'] = cell['metrics']['train']['loss'] = float('nan')
    change_cell(folder, '1-0', **cell)
    write_report(folder)

    def refuse(constant):
        raise AssertionError(constant)

    summary = json.loads((folder / 'summary.json').read_text(), parse_constant=refuse)
    assert summary['arms']['dropout']['train']['loss']['mean'] is None


def test_figures_hold_text_not_outlines(ablation):
    drawn = figures.draw(summarize(ablation({'none': 0.0, 'a < $b$ & c': 0.05})))
    for figure in drawn.values():
        assert figure['png'].startswith(b'\x89PNG')
        texts = [
            ''.join(e.itertext()) for e in ET.fromstring(figure['svg']).iter() if 'text' in e.tag
        ]
        assert any('a < $b$ & c' in text for text in texts)


def test_every_colour_of_a_figure_belongs_to_the_theme(ablation):
    for name, figure in figures.draw(summarize(ablation())).items():
        text = figures.themed(figure['svg'], name)
        assert re.findall(r'#[0-9a-fA-F]{6}\b', text) == []


def test_answers_of_earlier_runs_are_left_out_and_the_data_are_named(ablation):
    question = 'What?\n\nOn digits.\n\nAnswer (n = 5): none.\n\nThe same on garments: none.'
    page = write_report(ablation(question=question)).read_text()
    assert 'On digits.' in page
    assert 'garments' not in page
    assert 'mnist_5k: train[:500] to train, test to test' in page
