"""Memory, compute and collectives of contrastive losses on TPUs and GPUs that are not there.

    pip install -e '.[tpu]' && python benchmarks/similarity_tpu.py [--dense] [--topology=v5e:2x4]

For GPUs (h100) it needs XLA's plugin for them, and says how to install it.

Compiles value and gradient ahead of time, on bfloat16 embeddings sharded over the slice, and prints
a row a case. Compute is in units of 2·N²·D/devices, a product of all scores (for SimCLR N is the
number of views). `--topology` takes the rows of one slice; `--dense` adds the textbook form
`logits = a @ b.T`, where it compiles.
"""

import os
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')

import jax
import jax.numpy as jnp

from contrastive_jax import losses, parallel
from contrastive_jax.planning import hlo
from contrastive_jax.planning.chips import devices

RING = {'exchange': 'ring'}
OURS = {
    'clip': lambda a, b, t: losses.clip(a, b, t, **RING),
    'siglip': lambda a, b, t: losses.siglip(a, b, t, -10.0, **RING),
    'simclr': lambda a, b, t: losses.nt_xent(a, b, temperature=1 / t, **RING),
}
CASES = [
    ('v5e:16x16', 'clip', 2**20, 512),
    ('v5e:16x16', 'siglip', 2**20, 512),
    ('v5e:16x16', 'simclr', 2**20, 512),
    ('v5e:2x4', 'clip', 2**18, 768),
    ('v5e:2x4', 'clip', 2**22, 768),
    ('v5e:4x4', 'clip', 2**16, 512),
    ('v5e:4x8', 'clip', 2**17, 512),
    ('v4:2x2x4', 'clip', 2**16, 512),
    ('v5p:2x2x4', 'clip', 2**16, 512),
    ('v6e:4x4', 'clip', 2**16, 512),
    ('h100:8', 'clip', 2**18, 768),
    ('h100:8', 'siglip', 2**18, 768),
    ('h100:8', 'simclr', 2**18, 768),
    ('h100:4x8', 'clip', 2**20, 768),
]


def textbook(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    """CLIP's loss with the matrix of logits."""
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    logits = t * jnp.matmul(a, b.T, preferred_element_type=jnp.float32)
    images = jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits)
    texts = jax.nn.logsumexp(logits, 0) - jnp.diagonal(logits)
    return (images.mean() + texts.mean()) / 2


def row(topology: str, name: str, loss, B: int, D: int) -> str:
    chip, slice_ = devices(topology)
    mesh = parallel.make_mesh(slice_)
    with jax.set_mesh(mesh):
        rows, whole = parallel.rows(mesh), parallel.replicated(mesh)
        x = jax.ShapeDtypeStruct((B, D), jnp.bfloat16, sharding=rows)
        t = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        step = jax.jit(
            jax.value_and_grad(loss, (0, 1, 2)), out_shardings=(whole, (rows, rows, whole))
        )
        try:
            compiled = step.lower(x, x, t).compile(compiler_options=chip.options)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            return f'| {topology} | {name} | {B:,} | {D} | does not compile: out of memory | | |'
    costs = hlo.costs(compiled.as_text())
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    N = 2 * B if name == 'simclr' else B
    units = costs.flops / (2 * N * N * D / mesh.size)
    said = ', '.join(
        f'{c.count} {"async" if c.asynchronous else "SYNC"} {c.op}' for c in costs.collectives
    )
    return f'| {topology} | {name} | {B:,} | {D} | {memory:.2f} | {units:.3f} | {said} |'


def main() -> None:
    print('| slice | loss | pairs | D | temporaries a chip, MiB | compute | collectives |')
    print('|---|---|---|---|---|---|---|', flush=True)
    asked = [a.removeprefix('--topology=') for a in sys.argv if a.startswith('--topology=')]
    for topology, name, B, D in [c for c in CASES if c[0] in asked or not asked]:
        print(row(topology, name, OURS[name], B, D), flush=True)
        if '--dense' in sys.argv and name == 'clip':
            print(row(topology, 'textbook clip', textbook, B, D), flush=True)


if __name__ == '__main__':
    main()
