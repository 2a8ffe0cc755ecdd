"""Counting FLOPs, traffic and collectives; planning for hardware that is not there."""

import importlib.util
import json
import pathlib
import runpy
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from contrastive_jax import losses, parallel
from contrastive_jax import plan as planning
from contrastive_jax.config import UserError
from contrastive_jax.plan import said_to_need
from contrastive_jax.planning import chips, hlo
from contrastive_jax.planning.flops import jaxpr_flops

ROOT = pathlib.Path(__file__).parents[1]


def counted(function, *shapes):
    """(FLOPs of the traced program, costs of the compiled one)."""
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    traced = jax.jit(function).trace(*arguments)
    return jaxpr_flops(traced.jaxpr.jaxpr), hlo.costs(traced.lower().compile().as_text())


def test_products_in_loops_count_as_often_as_they_run():
    def f(a, b):
        def turn(x, _):
            return jnp.tanh(x @ b), None

        x, _ = jax.lax.scan(turn, a, None, length=7)
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ b, x).sum()

    traced, compiled = counted(f, (32, 16), (16, 16))
    assert traced == 10 * 2 * 32 * 16 * 16
    assert compiled.flops == traced
    assert compiled.unread_loops == 0


def test_convolutions_and_batched_products():
    def f(x, k, a):
        y = jax.lax.conv_general_dilated(
            x, k, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return y.sum() + jnp.einsum('bij,bjk->bik', a, a).sum()

    traced, compiled = counted(f, (2, 9, 9, 3), (3, 3, 3, 8), (5, 4, 4))
    assert traced == 2 * (2 * 4 * 4 * 8) * 27 + 2 * 5 * 4 * 4 * 4
    assert compiled.flops == traced


def test_padding_does_not_count_in_a_convolution():
    def f(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        ).sum()

    traced, compiled = counted(f, (1, 4, 4, 2), (3, 3, 2, 8))
    assert compiled.flops == traced == 2 * 2 * 8 * 10 * 10  # 10 of 12 taps a dimension are inside


def test_a_strided_convolutions_gradients_do_not_count_their_holes():
    def f(x, k):
        y = jax.lax.conv_general_dilated(
            x, k, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return (y**2).sum()

    traced, compiled = counted(jax.grad(f, (0, 1)), (1, 8, 8, 2), (3, 3, 2, 8))
    # The convolution and its two gradients: 11 of 12 taps a dimension are inside.
    assert compiled.flops == traced == 3 * 2 * 2 * 8 * 11 * 11


@pytest.mark.parametrize(
    ('devices', 'exchange', 'loss', 'units'),
    [
        *(
            (4, exchange, *loss)
            for exchange in ('ring', 'gather')
            for loss in [('clip', 4), ('siglip', 3), ('nt_xent', 3), ('info_nce', 4)]
        ),
        (1, 'auto', 'clip', 4),
        (1, 'auto', 'nt_xent', 2),
    ],
)
def test_compute_of_losses_in_matrix_products(devices, exchange, loss, units):
    """In units of 2·M·N·D / devices; the forward pass of NT-Xent is over M = N = 2B views."""
    B, D, tile = 512, 64, 32
    how = {'tile': tile, 'exchange': exchange}
    call = {
        'clip': lambda a, b: losses.clip(a, b, 10.0, **how),
        'siglip': lambda a, b: losses.siglip(a, b, 10.0, -10.0, **how),
        'nt_xent': lambda a, b: losses.nt_xent(a, b, temperature=0.1, **how),
        'info_nce': lambda a, b: losses.info_nce(a, b, b, temperature=0.1, **how),
    }[loss]
    mesh = parallel.make_mesh(jax.devices()[:devices])
    with jax.set_mesh(mesh):
        rows = parallel.rows(mesh)
        x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=rows)
        traced = jax.jit(jax.value_and_grad(call, (0, 1)), out_shardings=None).trace(x, x)
        compiled = hlo.costs(traced.lower().compile().as_text())
    N = 2 * B if loss == 'nt_xent' else B
    unit = 2 * N * N * D / devices
    assert units <= compiled.flops / unit <= units + 0.05
    assert units <= jaxpr_flops(traced.jaxpr.jaxpr) / devices / unit <= units + 0.05
    permutes = [c for c in compiled.collectives if c.op == 'collective-permute']
    assert bool(permutes) == (exchange == 'ring')
    if permutes and loss == 'info_nce':
        # Forwards the bank makes `devices` hops; backwards again, with a gradient as large.
        shard = B // devices * 4
        assert sum(c.bytes for c in permutes) == devices * shard * 3 * D
        assert sum(c.count for c in permutes) == devices * 3


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


# As XLA's compiler for GPUs writes it (0.10.2), shortened.
GPU = """
%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%nested (l: bf16[32,16], r: bf16[16,8]) -> bf16[32,8] {
  %l = bf16[32,16]{1,0} parameter(0)
  %r = bf16[16,8]{1,0} parameter(1)
  ROOT %dot.1 = bf16[32,8]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%later (p: bf16[64,4]) -> bf16[32,4] {
  %p = bf16[64,4]{1,0} parameter(0)
  ROOT %share = bf16[32,4]{1,0} reduce-scatter(%p), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (a: bf16[32,16], b: bf16[16,8], i: bf16[4,8,8,6], k: bf16[10,3,3,6]) -> bf16[32,8] {
  %a = bf16[32,16]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %i = bf16[4,8,8,6]{3,2,1,0} parameter(2)
  %k = bf16[10,3,3,6]{3,2,1,0} parameter(3)
  %mm = (bf16[32,8]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %fused = bf16[32,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%nested, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %out = (bf16[4,4,4,10]{3,2,1,0}, u8[0]{0}) custom-call(%i, %k), window={size=3x3 pad=0_1x0_1 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %y = bf16[4,4,4,10]{3,2,1,0} get-tuple-element(%out), index=0
  %di = (bf16[4,8,8,6]{3,2,1,0}, u8[0]{0}) custom-call(%y, %k), window={size=3x3 pad=0_1x0_1 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %dk = (bf16[10,3,3,6]{3,2,1,0}, u8[0]{0}) custom-call(%i, %y), window={size=3x3 pad=0_1x0_1 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %c = bf16[32,8]{1,0} get-tuple-element(%mm), index=0
  %ar = bf16[32,8]{1,0} all-reduce-start(%c), replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":false}}
  %ard = bf16[32,8]{1,0} all-reduce-done(%ar)
  %hop = (bf16[32,8]{1,0}, bf16[32,8]{1,0}) collective-permute-start(%ard), source_target_pairs={{0,1},{1,0}}, backend_config={"collective_backend_config":{"is_sync":true}}
  %hopped = bf16[32,8]{1,0} collective-permute-done(%hop)
  %big = bf16[64,4]{1,0} bitcast(%hopped)
  %rs = ((bf16[64,4]{1,0}), bf16[32,4]{1,0}) async-start(%big), calls=%later
  %rsd = bf16[32,4]{1,0} async-done(%rs)
  ROOT %all = bf16[32,8]{1,0} all-gather(%rsd), replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}, dimensions={1}
}
"""  # noqa: E501


def test_what_gpus_libraries_do_is_counted():
    costs = hlo.costs(GPU)
    product = 2 * 32 * 16 * 8
    # 'SAME' at stride 2 over 8 places: 4 windows, of whose 12 taps the last meets padding.
    convolution = 2 * 4 * 6 * 10 * 11 * 11
    assert costs.flops == 2 * product + 3 * convolution
    assert costs.collectives == [
        ('all-gather', False, 1, 0.5 * 512),
        ('all-reduce', True, 1, 2 * 7 / 8 * 512),
        ('collective-permute', False, 1, 512),
        ('reduce-scatter', True, 1, 256),
    ]
    matrices, image, filters, out = 2 * (32 * 16 + 16 * 8 + 32 * 8), 3072, 1080, 1280
    # cuBLAS' room to work in does not count; a collective reads and writes.
    moved = 2 * matrices + 3 * (image + filters + out) + 2 * 512 + 3 * 512 + (512 + 256) + 768
    assert costs.bytes == moved


def test_what_crosses_nodes_is_as_fast_as_a_network_card():
    h100, v5e = chips.CHIPS['h100'], chips.CHIPS['v5e']
    node = [SimpleNamespace(process_index=0)] * 8
    nodes = node + [SimpleNamespace(process_index=1)] * 8
    assert h100.rate('collective-permute', node) == h100.rate('all-reduce', node) == 450e9
    assert h100.rate('collective-permute', nodes) == h100.rate('all-to-all', nodes) == 50e9
    assert h100.rate('all-reduce', nodes) == 8 * 50e9
    assert v5e.rate('collective-permute', nodes) == v5e.rate('all-reduce', nodes) / 4


def test_chips_and_their_compilers():
    with pytest.raises(UserError, match=r"'7x', 'h100'"):
        chips.devices('a100:8')
    with pytest.raises(UserError, match="as in 'h100:8'"):
        chips.devices('h100:2x2x2')
    if not installed('jax_plugins.xla_cuda12'):
        with pytest.raises(UserError, match=f'jax-cuda12-pjrt=={jax.__version__}'):
            chips.devices('h100:8')


def test_only_what_runs_counts_in_a_traced_program():
    def f(a, b):
        a @ a @ a  # nobody needs it
        return jax.lax.platform_dependent(
            a, b, cpu=lambda a, b: a @ b, default=lambda a, b: (a @ b) @ b
        )

    a = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    traced = jax.jit(f).trace(a, a).jaxpr.jaxpr
    assert jaxpr_flops(traced) == 2 * 8**3
    assert jaxpr_flops(traced, 'tpu') == 2 * 2 * 8**3


def test_what_a_compiler_says_is_missing_is_read():
    GiB = 2**30
    used = 'RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.'
    assert said_to_need(used, GiB) == 20.5 * GiB
    # As libtpu 0.0.42 has it; what the program is given comes on top.
    temporaries = (
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
        'temporaries (110.50G) exceeds available HBM (15.75G).'
    )
    assert said_to_need(temporaries, GiB) == 111.5 * GiB
    assert said_to_need('RESOURCE_EXHAUSTED: hbm', GiB) is None


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match='ENTRY'):
        hlo.costs('module {}')


def plan(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'contrastive_jax.plan', *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        ([], '--topology is required'),
        (['--topology=v5f:2x2'], "Exists: 'v4', 'v5e'"),
        (['--topology=v5e'], 'v5e:2x4'),
    ],
)
def test_mistakes_are_answered(flags, said):
    out = plan('--config=configs/simclr_vit.py', *flags)
    assert out.returncode == 2
    assert said in out.stderr
    assert 'Traceback' not in out.stderr


def needs(module, how):
    if not installed(module):
        pytest.skip(f'needs {module}: {how}')


@pytest.mark.tpu
@pytest.mark.parametrize(
    ('config', 'topology', 'devices'),
    [
        ('configs/simclr_vit.py:digits', 'v5e:2x2', 4),
        ('configs/simclr_resnet.py:digits', 'v4:2x2x1', 4),
        ('configs/simclr_vit.py:cifar10', 'v6e:2x4', 8),
    ],
)
def test_plan_compiles_the_real_step(config, topology, devices):
    needs('libtpu', "pip install -e '.[test,tpu]'")
    out = plan(f'--config={config}', f'--topology={topology}', '--json')
    assert out.returncode == 0, out.stderr[-2000:]
    p = json.loads(out.stdout.splitlines()[-1])
    assert p['devices'] == devices
    assert p['fits']
    assert 0 < p['state_bytes'] < p['needed_bytes'] < p['hbm_bytes']
    assert p['model_flops'] > 0
    assert 0.9 <= p['program_flops'] / p['model_flops'] <= 1.3
    assert p['unread_loops'] == 0
    assert any(c['op'] == 'all-reduce' for c in p['collectives'])  # of the gradients


@pytest.mark.tpu
@pytest.mark.parametrize(
    ('config', 'topology', 'op'),
    [
        ('configs/simclr_vit.py:digits', 'h100:8', 'all-gather'),
        ('configs/simclr_resnet.py:digits', 'h100:2x4', 'all-reduce'),
    ],
)
def test_plan_compiles_the_real_step_for_gpus(config, topology, op, monkeypatch):
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.5')
    needs('jax_plugins.xla_cuda12', 'pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin')
    out = plan(f'--config={config}', f'--topology={topology}', '--json')
    assert out.returncode == 0, out.stderr[-2000:]
    p = json.loads(out.stdout.splitlines()[-1])
    assert p['devices'] == 8
    assert p['fits']
    assert 0 < p['state_bytes'] < p['needed_bytes'] < p['hbm_bytes'] == 0.5 * 84942979072
    # On such small maps XLA pads some convolutions, and their holes, before cuDNN sees them.
    assert 0.9 <= p['program_flops'] / p['model_flops'] <= 1.4
    assert p['unread_loops'] == 0
    assert any(c['op'] == op for c in p['collectives'])


@pytest.mark.tpu
def test_what_a_tpus_compiler_refuses_does_not_fit():
    needs('libtpu', "pip install -e '.[test,tpu]'")
    digits = runpy.run_path(str(ROOT / 'configs/simclr_vit.py'))['get_config']('digits')
    digits.batch_size = 2**18
    p = planning.plan(digits, 'v5e:2x2', 1617)
    assert not p['fits']
    assert p['needed_bytes'] > p['hbm_bytes']
    assert 'does NOT fit' in planning.report(p)


@pytest.mark.tpu
def test_what_does_not_fit_is_said_with_what_would(monkeypatch):
    needs('jax_plugins.xla_cuda12', 'pip install --no-deps jax-cuda12-pjrt jax-cuda12-plugin')
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.02')
    out = plan(
        '--config=configs/simclr_vit.py:digits',
        '--config.batch_size=16384',
        '--topology=h100:8',
        '--json',
    )
    assert out.returncode == 0, out.stderr[-2000:]
    p = json.loads(out.stdout.splitlines()[-1])
    assert not p['fits']
    assert p['needed_bytes'] > p['hbm_bytes']
    assert any(tried['fits'] for tried in p['remedies'].values())
    for name, tried in p['remedies'].items():
        assert tried['fits'] == (tried['needed_bytes'] <= tried['hbm_bytes'])
        assert f'with {name}\n' in out.stdout
