import pytest

from cnn_jax.scaling import hlo
from cnn_jax.scaling.hlo import Collective, instructions

LAYOUT = '{3,2,1,0:T(8,128)}'


def program(*lines, before=''):
    body = '\n'.join(f'  {line}' for line in lines)
    head = f'HloModule jit_f, is_scheduled=true\n\n{before}\n'
    return f'{head}ENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n'


def array(text):
    (one,) = next(instructions(program(f'%x = {text} parameter(0)'))).arrays
    return one


@pytest.mark.parametrize(
    ('text', 'logical', 'padded'),
    [
        ('f32[2,3]', 24, 24),  # no layout
        ('f32[2,3]{1,0}', 24, 24),  # no tiles
        ('f32[2,3]{1,0:T(8,128)}', 24, 8 * 128 * 4),
        ('f32[2,3]{0,1:T(8,128)}', 24, 8 * 128 * 4),
        ('f32[3,130]{1,0:T(2,128)}', 3 * 130 * 4, 4 * 256 * 4),
        ('f32[130,3]{0,1:T(2,128)}', 3 * 130 * 4, 4 * 256 * 4),  # the first axis is the fastest
        ('bf16[5,16,16]{2,1,0:T(8,128)(2,1)}', 5 * 256 * 2, 5 * 16 * 128 * 2),
        ('f32[]{:T(128)}', 4, 512),
        ('f32[300]{0:T(256)}', 1200, 512 * 4),
        ('pred[8]{0:T(512)(128)(4,1)}', 8, 512),
        ('u4[3]{0}', 2, 2),  # half bytes
        ('f32[0,4]{1,0:T(8,128)}', 0, 0),
    ],
)
def test_tiles_round_the_fastest_axes_up(text, logical, padded):
    assert (array(text).nbytes, array(text).padded) == (logical, padded)


def test_memory_space_and_dynamic_sizes_are_read():
    assert array('f32[8]{0:T(128)S(1)}').space == 1
    assert array('f32[8]{0:T(128)}').space == 0
    assert array('f32[<=8]{0:T(128)}').dynamic


def test_an_instruction_with_a_tuple_comments_and_a_root():
    line = 'ROOT %a.1 = (f32[2]{0:T(128)S(1)}, /*index=1*/s32[]{:T(128)}) all-reduce(%b, %c), x={}'
    (one,) = instructions(program(line))
    assert (one.name, one.opcode, one.place, one.entry) == ('a.1', 'all-reduce', 'main', True)
    assert [str(a) for a in one.arrays] == ['f32[2]', 's32[]']


@pytest.mark.parametrize(
    ('groups', 'size'),
    [
        ('replica_groups={{0,1,2,3},{4,5,6,7}}', 4),
        ('replica_groups=[4,2]<=[8]', 2),
        ('replica_groups=[2,4]<=[4,2]T(1,0)', 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("replica_groups=mesh['data'=4,'model'=2] {'data','model'}", 8),
        ('replica_groups={}', 8),
        ('channel_id=1', 8),
    ],
)
def test_the_size_of_a_group(groups, size):
    (one,) = hlo.collectives(program(f'%r = f32[3]{{0}} all-reduce(%a), {groups}, to_apply=%s'), 8)
    assert one == Collective('all-reduce', 12, size)


def test_sizes_are_those_of_the_whole_array():
    text = program(
        '%a = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups={{0,1}}',
        '%g = f32[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}',
        '%s = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1}}, dimensions={0}',
        '%t = f32[4]{0} all-to-all(%x), replica_groups={{0,1}}',
        '%p = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}',
    )
    found = {c.kind: c.nbytes for c in hlo.collectives(text, 2)}
    assert found == {
        'all-reduce': 28,
        'all-gather': 32,
        'reduce-scatter': 32,
        'all-to-all': 16,
        'collective-permute': 16,
    }


def test_an_asynchronous_pair_counts_once_with_its_result():
    text = program(
        '%a = f32[4]{0} all-reduce-start(%x), replica_groups={{0,1}}',
        '%b = f32[4]{0} all-reduce-done(%a)',
        '%c = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1}}',
        '%d = f32[8]{0} all-gather-done(%c)',
        '%e = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)',
    )
    assert [c.nbytes for c in hlo.collectives(text, 2)] == [16, 32, 16]


def test_communication_inside_other_computations_is_found_and_loops_are_told():
    inner = (
        '%body (p: f32[4]) -> f32[4] {\n  %r = f32[4]{0} all-reduce(%p), to_apply=%s\n}\n'
        '%wrapped (p: f32[4]) -> f32[8] {\n  ROOT %g = f32[8]{0} all-gather(%p)\n}\n'
    )
    text = program(
        '%w = f32[4]{0} while(%x), condition=%cond, body=%body',
        '%f = f32[8]{0} fusion(%x), kind=kCustom, calls=%wrapped',
        before=inner,
    )
    assert hlo.collectives(text, 4) == [
        Collective('all-reduce', 16, 4, looped=True),
        Collective('all-gather', 32, 4),
    ]


def test_a_fused_reduce_scatter_is_one():
    inner = (
        '%all-reduce-scatter.3 (p: f32[8]) -> f32[2] {\n'
        '  %r = f32[8]{0} all-reduce(%p), to_apply=%s\n'
        '  ROOT %d = f32[2]{0} dynamic-slice(%r, %i)\n}\n'
    )
    text = program('%f = f32[2]{0} fusion(%x), calls=%all-reduce-scatter.3', before=inner)
    assert hlo.collectives(text, 4) == [Collective('reduce-scatter', 32, 4)]


def test_padding_counts_what_lies_in_the_memory_of_the_chip_once():
    text = program(
        f'%p = f32[2,2,4,16]{LAYOUT} parameter(0)',  # 256 of 4,096 numbers
        '%b = f32[4,64]{1,0:T(8,128)} bitcast(%p)',
        f'%g = f32[2,2,4,16]{LAYOUT} get-tuple-element(%t), index=0',
        '%on_chip = f32[2,2]{1,0:T(8,128)S(1)} fusion(%p), kind=kLoop, calls=%inside',
        '%full = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%inside',
        before='%inside (p: f32[2]) -> f32[2] {\n  %i = f32[1]{0:T(128)} add(%p, %p)\n}\n',
    )
    found = hlo.padding(text)
    assert found.logical == (256 + 1024) * 4
    assert found.tiled == (4096 + 1024) * 4
    assert hlo.padding(text, hlo.ON_CHIP).logical == 16
    assert found.worst == (('f32[2,2,4,16]', (4096 - 256) * 4),)


def test_traffic_is_what_is_read_from_hbm_and_written_to_it():
    tiles = '{1,0:T(8,128)}'  # 4,096 bytes of one tile
    text = program(
        f'%p = f32[8,128]{tiles} parameter(0)',
        f'%q = f32[16,128]{tiles} parameter(1)',
        # reads p, writes on the chip
        '%a = f32[8,128]{1,0:T(8,128)S(1)} fusion(%p), kind=kLoop, calls=%inside',
        # a part of q comes onto the chip
        '%s = ((f32[16,128]), f32[8,128]{1,0:T(8,128)S(1)}, s32[]) slice-start(%q)',
        '%d = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)',
        # from the chip to HBM
        f'%b = f32[8,128]{tiles} add(%a, %d)',
        '%c = (f32[8,128], f32[8,128]{1,0:T(8,128)S(1)}, u32[]) copy-start(%d)',
        f'%e = f32[8,128]{tiles} copy-done(%c)',
        # a name for b, read once
        '%n = f32[1024]{0:T(1024)} bitcast(%b), metadata={op_name="f(%q)"}',
        '%f = f32[8]{0:T(128)S(1)} fusion(%n, %a), kind=kLoop, calls=%inside',
    )
    assert hlo.traffic(text) == 4096 * (1 + 1 + 1 + 1 + 1)


def test_host_transfers_are_found_wherever_they_are():
    text = program(
        '%i = ((f32[2]{0}), token[]) infeed(%t)',
        '%o = token[] outfeed(%x, %t)',
        '%s = (f32[2]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true',
        '%d = token[] send-done(%s), channel_id=1',
        '%c = f32[2]{0} custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"',
        '%m = f32[2]{0} custom-call(%x), custom_call_target="MoveToHost"',
        '%k = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call"',
    )
    assert hlo.host_transfers(text) == [
        'infeed',
        'outfeed',
        'send',
        'xla_ffi_python_cpu_callback',
        'MoveToHost',
    ]
    assert not hlo.host_transfers(program('%x = f32[2]{0} add(%a, %b)'))


def test_wide_and_dynamic_types_are_told():
    text = program('%a = f64[2]{0} add(%x, %x)', '%b = f32[<=3]{0} f(%a)', '%c = s64[2]{0} g(%b)')
    assert hlo.unwanted(text) == ['f32[3] of dynamic size', 'f64[2]']


def test_a_program_that_xla_compiled_for_this_machine_is_read():
    import jax
    import jax.numpy as jnp

    text = jax.jit(lambda x: jnp.sort(x @ x)).lower(jnp.ones((4, 4))).compile().as_text()
    lines = list(instructions(text))
    (parameter,) = (line for line in lines if line.entry and line.opcode == 'parameter')
    assert str(parameter.arrays[0]) == 'f32[4,4]'
    assert len(lines) == sum(' = ' in line for line in text.splitlines() if line[:2] == '  ')
