"""The learning-rate finder as a command."""


def test_it_suggests_a_rate_and_writes_the_curve(launch, tiny, tmp_path):
    done = launch('find_lr', *tiny, f'--out={tmp_path}', '--steps=60', check=0)
    assert 'suggestion: --config.optimizer.learning_rate=' in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ['lr_finder.csv', 'lr_finder.png']


def test_rates_that_do_not_grow_are_a_mistake(launch, tiny, tmp_path):
    done = launch('find_lr', *tiny, f'--out={tmp_path}', '--lowest=1', '--highest=0.1', check=2)
    assert 'must be below --highest' in done.stderr
