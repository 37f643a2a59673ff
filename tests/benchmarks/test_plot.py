from benchmarks import plot, results

STEP = """Words.

| contender | ms a step | of the best peer | of GEMM peak |
| --- | ---: | ---: | ---: |
| cnn_jax | 8.0 [7.0–9.0] | 0.80 [0.70–0.90] | 60% |
| Flax with our runtime settings | 9.0 [9.0–9.0] | 0.90 [0.90–0.90] | 55% |
| PyTorch | 10.0 [9.0–11.0] | 1.00 [1.00–1.00] | 48% |
"""
TWICE = """| contender | cold, s | of the best peer | warm, s | of the best peer |
| --- | ---: | ---: | ---: | ---: |
| cnn_jax | 4 | 2.00 [2.00–2.00] | 1 | 0.50 [0.50–0.50] |
| Flax | 2 | 1.00 [1.00–1.00] | 2 | 1.00 [1.00–1.00] |
"""
OF_OURS = """| contender | seconds | of cnn_jax | none |
| --- | ---: | ---: | ---: |
| cnn_jax | 10 | 1.00 [1.00–1.00] | 90.0 |
| Flax | 40 | 4.00 [4.00–4.00] | 90.0 |
| PyTorch | 20 | 2.00 [2.00–2.00] | 89.0 |
"""


def sections(tmp_path):
    path = tmp_path / 'RESULTS.md'
    bodies = {'Step': STEP, 'Start': TWICE, 'Ablation': OF_OURS, 'Prose': 'No table.'}
    for title, body in bodies.items():
        results.write_section(path, title, body)
    return path


def test_the_ratios_are_those_of_the_tables(tmp_path):
    found = {each.title: each.ratios for each in plot.workloads(sections(tmp_path).read_text())}
    assert found == {
        'Step': {'cnn_jax': 0.8, 'Flax with our runtime settings': 0.9, 'PyTorch': 1.0},
        'Start, cold': {'cnn_jax': 2.0, 'Flax': 1.0},
        'Start, warm': {'cnn_jax': 0.5, 'Flax': 1.0},
        'Ablation': {'cnn_jax': 0.5, 'Flax': 2.0, 'PyTorch': 1.0},
    }


def test_the_figure_is_small(tmp_path):
    found = list(plot.workloads(sections(tmp_path).read_text()))
    plot.draw(found, tmp_path / 'docs' / 'speed.png')
    image = (tmp_path / 'docs' / 'speed.png').read_bytes()
    assert image.startswith(b'\x89PNG')
    assert len(image) < 200_000
