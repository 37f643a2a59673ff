"""The colours and the style of an ablation's figures, in a file and in the report's page."""

import xml.etree.ElementTree as ET

# Colours of the light theme, and the CSS variables that replace them in the page.
INK, MUTED, RULE, SURFACE = '#1b1f24', '#57606b', '#d1d7de', '#fefefe'
BLUE, ORANGE, GREY = '#0069a8', '#b34a00', '#6b7480'
VARIABLES = {
    INK: '--ink',
    MUTED: '--muted',
    RULE: '--rule',
    SURFACE: '--surface',
    BLUE: '--blue',
    ORANGE: '--orange',
    GREY: '--grey',
}
STYLE = {
    'svg.fonttype': 'none',
    'text.parse_math': False,  # an arm's name is text, whatever it holds
    'font.size': 10,
    'font.family': 'sans-serif',
    'figure.facecolor': SURFACE,
    'savefig.facecolor': SURFACE,
    'axes.facecolor': 'none',
    'axes.edgecolor': MUTED,
    'axes.labelcolor': INK,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': RULE,
    'grid.linewidth': 0.6,
    'text.color': INK,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'xtick.labelcolor': INK,
    'ytick.labelcolor': INK,
    'legend.frameon': False,
    'lines.linewidth': 1.6,
}


def themed(svg: str, label: str) -> str:
    """A figure as an element of the page: its colours are the page's, its label is read aloud."""
    namespace = 'http://www.w3.org/2000/svg'
    ET.register_namespace('', namespace)
    ET.register_namespace('xlink', 'http://www.w3.org/1999/xlink')
    root = ET.fromstring(svg)
    for metadata in root.findall(f'{{{namespace}}}metadata'):
        root.remove(metadata)
    for size in ('width', 'height'):
        del root.attrib[size]
    root.attrib |= {'role': 'img', 'aria-label': label}
    text = ET.tostring(root, encoding='unicode')
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f'var({variable})')
    return text
