"""Gradient caching on this CPU: `config.microbatch` against encoding the whole batch at once.

    python benchmarks/gradient_caching.py

Prints two Markdown tables, for SimCLR (temperature 0.1) with a ViT-S/16 (width 384, depth 12, 6
heads) in float32:

- how far the gradient of a step's loss is from the whole batch's, as ‖difference‖ / ‖gradient‖ over
  all parameters, at 64 pairs of 32 pixels. What rounding alone does is shown by the whole batch in
  another order; what is not exact, by the mean over parts that each have negatives of their own.
- memory and time of a training step at 4,096 pairs: how far the peak of the resident memory lies
  above what was resident before the step (state and batch are, and count not; a process for each
  variant, one step, without a warm-up), and the temporaries that the compiled program asks for. At
  32 pixels an image has 5 tokens, which a laptop can run; at ViT's 224 pixels it has 197, and the
  step is compiled, not run.

A step whose temporaries exceed what memory is free is not run either. Images are random blobs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

IMAGE_SIZES = {32: True, 224: False}  # pixels -> is it run?


def recipe(pairs: int, microbatch: int, image_size: int) -> Any:
    from contrastive_jax import config

    c = config.base()
    c.total_steps, c.batch_size, c.microbatch = 10, pairs, microbatch
    c.inputs = config.images()
    c.inputs.size = image_size
    c.model = {'name': 'vit', 'size': 'S', 'patch': 16}
    c.method = {'name': 'simclr', 'temperature': 0.1}
    c.optim = {'name': 'adamw', 'learning_rate': 1e-4}
    return c.lock()


def images(pairs: int, size: int) -> Any:
    """[pairs, 2, size, size, 3] uint8: 4 × 4 squares of random colours, the two views alike."""
    import numpy as np

    rng = np.random.default_rng(0)
    squares = rng.integers(0, 224, (pairs, 1, 4, 4, 3)) + rng.integers(0, 32, (pairs, 2, 4, 4, 3))
    return squares.astype(np.uint8).repeat(size // 4, 2).repeat(size // 4, 3)


def exactness(pairs: int, microbatch: int, image_size: int) -> None:
    """Prints the first table."""
    import jax
    import jax.numpy as jnp
    import optax

    from contrastive_jax import experiment, parallel

    mesh = parallel.make_mesh(jax.devices()[:1])
    parts = pairs // microbatch
    views = jnp.asarray(images(pairs, image_size), jnp.float32) / 127.5 - 1
    key, progress = jax.random.key(0), jnp.float32(0)
    with jax.set_mesh(mesh):
        whole, cached = (
            experiment.build(recipe(pairs, m, image_size), mesh, pairs) for m in (0, microbatch)
        )
        state = whole.init()

        def gradient(program: Any, views: jax.Array) -> Any:
            index = jnp.arange(len(views))
            batch = {'views': views, 'label': index, 'index': index}

            def loss(params: Any) -> jax.Array:
                return program.method.loss(params, state.extra, batch, key, progress)[0]

            return jax.jit(jax.grad(loss))(state.params)

        expected = gradient(whole, views)
        by_parts = [gradient(whole, views[i::parts]) for i in range(parts)]
        found = {
            f'`microbatch={microbatch}`': gradient(cached, views),
            'the whole batch, images in reverse order': gradient(whole, views[::-1]),
            f'mean over {parts} parts, each with its own negatives': jax.tree.map(
                lambda *d: sum(d) / parts, *by_parts
            ),
        }
        print(f'{pairs:,} pairs, {image_size} pixels, ‖gradient‖ {optax.tree.norm(expected):.4g}\n')
        print('| gradient | ‖difference‖ / ‖gradient‖ |')
        print('|---|---|')
        for name, got in found.items():
            difference = jax.tree.map(jnp.subtract, got, expected)
            ratio = optax.tree.norm(difference) / optax.tree.norm(expected)
            print(f'| {name} | {ratio:.1e} |', flush=True)


def step(pairs: int, microbatch: int, image_size: int) -> None:
    """One step, in this process: prints a JSON line when it is compiled and one when it has run."""
    import jax
    import numpy as np
    from similarity_cpu import forget_peak, peak

    from contrastive_jax import experiment, parallel

    mesh = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        built = experiment.build(recipe(pairs, microbatch, image_size), mesh, pairs)
        compiled = built.step.lower(built.state, built.batch).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        print(json.dumps({'temporaries': temporaries}), flush=True)
        if not IMAGE_SIZES[image_size] or temporaries > free():
            return
        batch = {k: np.zeros(x.shape, x.dtype) for k, x in built.batch.items()}
        batch['views'] = images(pairs, image_size)
        batch = jax.device_put(batch, parallel.rows(mesh))
        state = jax.block_until_ready(built.init())
        exact = forget_peak()
        before, start = peak(), time.perf_counter()
        loss = float(jax.block_until_ready(compiled(state, batch))[1]['loss'])
        seconds = time.perf_counter() - start
        print(json.dumps({'peak': peak() - before, 'seconds': seconds, 'exact': exact}), flush=True)
        assert np.isfinite(loss), loss


def free() -> float:
    """Bytes of memory that a process can still have, infinite where the system does not say."""
    try:
        with open('/proc/meminfo') as file:
            fields = dict(line.split(':') for line in file)
    except OSError:
        return float('inf')
    return int(fields['MemAvailable'].split()[0]) * 1024


def memory(pairs: int, microbatch: int, image_size: int) -> str:
    """A row of the second table, from a process of its own."""
    sizes = f'--pairs={pairs}', f'--microbatch={microbatch}', f'--step={image_size}'
    out = subprocess.run([sys.executable, __file__, *sizes], capture_output=True, text=True)
    lines = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{')]
    if not lines or (out.returncode > 0):
        sys.exit(f'{image_size} pixels, microbatch={microbatch}: {out.stderr[-2000:]}')
    got = {k: v for line in lines for k, v in line.items()}
    peak, seconds = 'not run', ''
    if out.returncode < 0:
        peak = f'killed by signal {-out.returncode}'
    elif 'peak' in got:
        peak, seconds = f'{got["peak"] / 2**30:.2f}', f'{got["seconds"]:.1f}'
        if not got['exact']:
            peak += ' (over that of compilation)'
    elif IMAGE_SIZES[image_size]:
        peak = 'not run: exceeds the free memory'
    name = f'`microbatch={microbatch}`' if microbatch else 'whole batch'
    return f'| {image_size} | {name} | {peak} | {got["temporaries"] / 2**30:.2f} | {seconds} |'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--pairs', type=int, default=4096, help='of the second table')
    parser.add_argument('--microbatch', type=int, default=128, help='of the second table, in pairs')
    parser.add_argument('--step', type=int, help=argparse.SUPPRESS)
    parser.add_argument('--exactness', action='store_true', help='the first table only')
    args = parser.parse_args()
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if args.step:
        step(args.pairs, args.microbatch, args.step)
        return
    if args.exactness:
        exactness(pairs=64, microbatch=16, image_size=32)
        return
    # Not in this process, whose memory the steps may need.
    subprocess.run([sys.executable, __file__, '--exactness'], check=True)
    print(f'\n{args.pairs:,} pairs\n')
    print('| pixels | a step on | peak memory, GiB | compiled temporaries, GiB | seconds |')
    print('|---|---|---|---|---|', flush=True)
    for image_size in IMAGE_SIZES:
        for microbatch in (0, args.microbatch):
            print(memory(args.pairs, microbatch, image_size), flush=True)


if __name__ == '__main__':
    main()
