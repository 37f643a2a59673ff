"""The profile of a run: a trace that opens, and a table of real layers."""

import re
from pathlib import Path

import jax
import pytest

from cnn_jax.train import profile
from cnn_jax.train.profile import Profile

LAYERS = ['block1_conv1', 'block1_conv2', 'block1_norm1', 'head/dense1', 'head/dense10']


@pytest.mark.parametrize(
    ('op_name', 'row'),
    [
        ('jit(train)/jvp(StridedNet)/block1_conv2/mul', ('block1_conv2', 'forward')),
        ('jit(train)/transpose(jvp(StridedNet))/block1_norm1/sub', ('block1_norm1', 'backward')),
        ('jit(train)/jvp(StridedNet)/head/dense1/dot_general', ('head/dense1', 'forward')),
        ('jit(train)/jvp(StridedNet)/head/dense10', ('head/dense10', 'forward')),
        ('jit(train)/jvp(StridedNet)/jit(relu)/max', ('activations and loss', 'forward')),
        ('jit(train)/sqrt', ('optimizer and rest', '')),
        ('', ('optimizer and rest', '')),
    ],
)
def test_an_operation_belongs_to_a_layer_and_a_pass(op_name, row):
    assert profile.place(op_name, LAYERS) == row


def test_the_times_of_a_row_add_up_and_other_programs_stand_apart():
    program = """HloModule jit_train, is_scheduled=true
      %mul.1 = f32[] multiply(a, b), metadata={op_name="jit(train)/jvp(Net)/block1_conv1/mul"}
      ROOT add.2 = f32[] add(a, b), metadata={op_type="add" op_name="jit(train)/add" stack=3}
    """
    spans = [('mul.1', 0.0, 1.0), ('mul.1', 5.0, 8.0), ('add.2', 8.0, 10.0)]
    events = [('jit_train', *span) for span in spans]
    rows = profile.breakdown([*events, ('jit_gather', 'mul.1', 0.0, 10.0)], program, LAYERS)
    assert rows == {
        ('batches, evaluation', ''): 7.0,
        ('block1_conv1', 'forward'): 2.0,
        ('optimizer and rest', ''): 1.0,
    }


def test_a_convolution_lasts_until_its_result_is_taken():
    program = """HloModule jit_train
      %conv.1 = f32[8,4]{1,0} convolution(%x, %k), window={size=3x3}, metadata={op_name="a"}
      %bitcast.2 = f32[32]{0} bitcast(%conv.1), metadata={op_name="b"}
      %add.3 = f32[32]{0} fusion(%bitcast.2, %x), kind=kLoop, calls=%f, metadata={op_name="c"}
      ROOT %dot.4 = f32[] dot(%add.3, %add.3), metadata={op_name="d"}
    """
    times = [
        ('conv.1', 0.0, 1.0),
        ('add.3', 5.0, 6.0),
        ('conv.1', 10.0, 11.0),
        ('add.3', 14.0, 15.0),
    ]
    events = [('jit_train', *span) for span in times]
    ends = [end for *_, end in profile.completed([*events, ('jit_train', 'dot.4', 6, 7)], program)]
    assert ends == [5.0, 6.0, 14.0, 15.0, 7]


def test_operations_that_run_at_once_share_the_time():
    assert profile.shares([(0.0, 4.0), (2.0, 3.0), (8.0, 9.0), (9.0, 9.0)]) == [3.5, 0.5, 1.0, 0.0]


def test_the_table_shows_the_largest_and_sums_up_the_others():
    rows = {(f'layer{k}', 'forward'): (20 - k) / 1e3 for k in range(20)}
    lines = profile.table(rows, count=2)
    assert lines[1].split() == ['layer0', 'forward', '10.00', '9.5%']
    assert lines[-4].split() == ['5', 'more', '7.50', '7.1%']
    assert lines[-3].split() == ['total', '105.00', '100.0%']
    assert len(lines) == 1 + profile.ROWS + 4


def test_a_trace_without_operations_is_said_to_be_one():
    [line] = profile.table({}, count=5)
    assert 'no operation in the trace' in line


@pytest.fixture
def profiled(small, run, batch, tmp_path):
    """Trains some steps under a profile and returns what it said."""

    def make(count):
        steps, state, values = run(small())
        train_step, said = jax.jit(steps.train, donate_argnums=0), []
        traced = Profile(tmp_path / 'profile', ['block1_conv1', 'block2_norm1', 'head/dense1'])
        for step in range(1, count + 1):
            traced.before(state)
            state, _ = train_step(state, batch(step), values)
            arguments = state, batch(step), values
            said.append(traced.after(step, train_step, arguments, step == count))
        return traced, said

    return make


def test_a_real_run_names_its_layers(profiled, tmp_path):
    traced, said = profiled(10)
    assert traced.taken
    assert [step for step, text in enumerate(said, start=1) if text] == [7]
    lines = said[6].splitlines()
    [wall] = re.findall(r'profile of steps 3 to 7, ([\d.]+) ms a step:', lines[0])
    rows = {tuple(line.split()[:-2]) for line in lines[2:]}
    for layer in ('block1_conv1', 'block2_norm1', 'head/dense1'):
        assert (layer, 'forward') in rows or (layer, 'backward') in rows, layer
    total = float(next(line for line in lines if line.startswith('  total')).split()[1])
    assert 0 < total <= float(wall) * 1.02
    [trace] = re.findall(r'open (\S+) in https', said[6])
    assert trace.startswith(str(tmp_path))
    assert Path(trace).name in {path.name for path in tmp_path.glob('profile/plugins/profile/*/*')}


def test_a_phase_that_ends_early_ends_the_trace(profiled):
    _, said = profiled(4)
    assert said[3].startswith('profile of steps 3 to 4,')


def test_a_run_of_two_steps_has_nothing_to_trace(profiled):
    traced, said = profiled(2)
    assert not traced.taken
    assert said == ['', '']
