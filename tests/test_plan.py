"""Counting FLOPs, traffic and collectives; planning for hardware that is not there."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from contrastive_jax import hlo, losses, parallel
from contrastive_jax.plan import jaxpr_flops

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


def test_padding_does_not_count_in_a_compiled_convolution():
    def f(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        ).sum()

    _, compiled = counted(f, (1, 4, 4, 2), (3, 3, 2, 8))
    assert compiled.flops == 2 * 2 * 8 * 10 * 10  # 10 of 12 taps a dimension are inside


@pytest.mark.parametrize('exchange', ['ring', 'gather'])
@pytest.mark.parametrize(
    ('loss', 'units'), [('clip', 4), ('siglip', 3), ('nt_xent', 3), ('info_nce', 4)]
)
def test_compute_of_losses_in_matrix_products(loss, units, exchange):
    """In units of 2·M·N·D / devices; the forward pass of NT-Xent is over M = N = 2B views."""
    B, D, tile, devices = 512, 64, 32, 4
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
        # Forwards the bank (z and its scale) makes `devices` hops; backwards its gradient, too.
        one = B // devices * (D + 1) * 4
        assert sum(c.bytes for c in permutes) == 3 * devices * one
        assert sum(c.count for c in permutes) == 3 * 2 * devices


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


def needs_libtpu():
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip("needs libtpu: pip install -e '.[test,tpu]'")


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
    needs_libtpu()
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
def test_what_does_not_fit_is_said_with_what_would():
    needs_libtpu()
    out = plan(
        '--config=configs/simclr_vit.py:cifar10',
        '--config.batch_size=65536',
        '--topology=v5e:2x2',
        '--json',
    )
    assert out.returncode == 0, out.stderr[-2000:]
    p = json.loads(out.stdout.splitlines()[-1])
    assert not p['fits']
    assert p['needed_bytes'] > p['hbm_bytes']
    assert any(tried['fits'] for tried in p['remedies'].values())
