"""launch.predict with Monte-Carlo dropout."""

import json
import math


def test_mc_adds_the_uncertainty_and_repeats_itself(launch, tiny_run, tmp_path):
    folder, _ = tiny_run
    launch('sample', '--source=digits', '--count=3', f'--out={tmp_path}', check=0)
    command = 'predict', f'--workdir={folder}', '--mc=5', tmp_path
    done = launch(*command, '--json', check=0)
    rows = json.loads(done.stdout)
    assert len(rows) == 3
    for row in rows:
        assert 0 < row['mutual_information'] < row['entropy'] < math.log(10)
    assert launch(*command, '--json', check=0).stdout == done.stdout
    table = launch(*command, check=0).stdout
    assert table.count('  entropy ') == table.count('  mutual information ') == 3
