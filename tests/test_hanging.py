"""Runs do not hang on CPUs: docs/troubleshooting.md says what XLA does, and what is done here."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from pictures import make_folder
from test_train import ROOT

from contrastive_jax import parallel
from contrastive_jax.layers.convolution import convolve
from contrastive_jax.planning import hlo
from contrastive_jax.similarity import tiles


def compiled(function, *shapes):
    """The text of a program for eight devices, which share the rows of its arguments."""
    mesh = parallel.make_mesh(jax.devices()[:8])
    rows = parallel.rows(mesh)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows) for shape in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text()


PROGRAM = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: f32[4]) -> f32[4] {
  %carry = f32[4]{0} parameter(0)
  ROOT %total = f32[4]{0} INSIDE
}

%condition (carry: f32[4]) -> pred[] {
  %carry = f32[4]{0} parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %early = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  %loop = f32[4]{0} while(%x), condition=%condition, body=%body
  %scaled = f32[4]{0} multiply(%NEEDED, %x)
  %late = f32[4]{0} all-gather(%scaled), replica_groups={{0,1}}, dimensions={0}
  %again = f32[4]{0} while(%late), condition=%condition, body=%body
  ROOT %both = f32[4]{0} add(%again, %loop)
}
"""
REDUCE = 'all-reduce(%carry), replica_groups={{0,1}}, to_apply=%add'


@pytest.mark.parametrize(
    ('inside', 'needed', 'pairs'),
    [
        (REDUCE, 'x', [('loop', 'late'), ('loop', 'again')]),
        (REDUCE, 'early', [('loop', 'late'), ('loop', 'again')]),
        (REDUCE, 'loop', []),
        ('negate(%carry)', 'x', []),
    ],
)
def test_a_collective_may_overtake_a_loop_that_it_does_not_need(inside, needed, pairs):
    assert hlo.overtaking(PROGRAM.replace('INSIDE', inside).replace('NEEDED', needed)) == pairs


def test_kernel_gradients_have_no_collective_in_their_loop():
    def loss(kernels, x):
        for kernel in kernels:
            x = convolve(x, kernel, 1, 1)
            x = jax.nn.relu(x - x.mean((0, 1, 2), keepdims=True))
        return jnp.mean(x**2)

    def gradients(x):
        return jax.grad(loss)([jnp.ones((3, 3, 64, 64))] * 2, x)

    text = compiled(gradients, (64, 16, 16, 64))
    assert text.count(' while(') == 2
    assert not hlo.overtaking(text)


def test_banks_are_gathered_on_cpus_and_go_around_a_ring_elsewhere():
    bank = jax.ShapeDtypeStruct((2**16, 64), jnp.float32)
    with jax.set_mesh(parallel.make_mesh(jax.devices()[:8])):
        assert tiles.Layout.of(bank, bank, 1024, 'auto').gather
        assert not tiles.Layout.of(bank, bank, 1024, 'ring').gather
    with jax.sharding.use_abstract_mesh(AbstractMesh((8,), (parallel.AXIS,))):
        assert not tiles.Layout.of(bank, bank, 1024, 'auto').gather


CASES = {
    'resnet_18': (
        2,
        [
            '--config=configs/simclr_resnet.py',
            '--config.inputs.size=32',
            "--config.model={'name': 'resnet', 'size': '18', 'stem': 'cifar'}",
        ],
    ),
    'folder': (8, ['--config=configs/simclr_resnet.py:cifar10_small']),
}


@pytest.mark.parametrize('case', CASES)
def test_what_hung_runs_with_default_flags(case, tmp_path):
    """Most of such starts waited for ever, until XLA aborted them after a minute."""
    devices, flags = CASES[case]
    if case == 'folder':
        make_folder(tmp_path / 'images', count=64)
        flags = [*flags, '--config.data.source=folder', f'--config.data.root={tmp_path / "images"}']
    out = subprocess.run(
        [
            *(sys.executable, '-m', 'contrastive_jax.main', *flags, '--config.evals={}'),
            *('--config.total_steps=4', '--config.log_every=1', f'--workdir={tmp_path / "run"}'),
        ],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert out.returncode == 0, out.stdout
    assert 'step 4/4' in out.stdout
