from benchmarks import results


def test_quartiles():
    assert results.quartiles([1, 2, 3, 4, 5]) == '3.0 [2.0–4.0]'


def test_table():
    assert results.table(['a', 'b'], [['x', '1']]) == '| a | b |\n| --- | ---: |\n| x | 1 |'


def test_a_section_is_replaced_in_place(tmp_path):
    path = tmp_path / 'RESULTS.md'
    for title, body in [('One', '1'), ('Two', '2'), ('One', 'uno')]:
        results.write_section(path, title, body)
    assert path.read_text() == f'{results.HEAD}\n## One\n\nuno\n\n## Two\n\n2\n'
