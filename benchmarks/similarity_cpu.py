"""Two contrastive losses, value and gradient, on this CPU: ours, dense JAX, the peers' PyTorch.

    python benchmarks/similarity_cpu.py                                # ours and dense
    python3.11 -m venv peers
    peers/bin/pip install torch==2.14.1 torchvision==0.29.1 open_clip_torch lightly
    python benchmarks/similarity_cpu.py --peers=peers/bin/python       # with open_clip and lightly
    python benchmarks/similarity_cpu.py --pairs=65536 --only=ours

Prints two Markdown tables: time, CPU time and memory of a call, and ours over the others'.

All see the same float32 embeddings, not normalised, on as many threads as there are cores, and give
the loss and its gradient in the embeddings; that they agree is checked. Each variant has a process
of its own, in turns whose order alternates. `open_clip_gather` has four, with a quarter of the
pairs each, and does what open_clip does unless it is told otherwise: every rank gathers all
embeddings and computes the whole matrix. Its CPU time and memory are the sums, its time the slowest
one's. `ours_sharded` has the same quarters on four devices of one process, as a ring.

A turn is a warm-up and three calls (fewer where they take more than a minute) and counts with their
median; tables have the median over turns, ratios that of the ratios within each turn. Memory is how
far the peak of the resident memory during the turn's calls, the warm-up among them, lies above what
was resident before: the gradients count, embeddings and compilation do not.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TEMPERATURE = 0.1
SECONDS = 60  # that a turn's calls take, unless one takes longer
VARIANTS = {
    'clip': ['ours', 'dense', 'open_clip', 'ours_sharded', 'open_clip_gather'],
    'nt_xent': ['ours', 'dense', 'lightly'],
}
TORCH = {  # variant -> distribution
    'open_clip': 'open_clip_torch',
    'open_clip_gather': 'open_clip_torch',
    'lightly': 'lightly',
}
PARTS = {'open_clip_gather': 4, 'ours_sharded': 4}  # of the pairs: a rank's, a device's
RATIOS = (
    *(('ours', other) for other in ('dense', 'open_clip', 'lightly')),
    *(('ours_sharded', other) for other in ('ours', 'open_clip_gather')),
)
COLUMNS = {'seconds': 1, 'cpu_seconds': 1, 'bytes': 2**20}

Call = Callable[[], tuple[float, Any, Any]]  # () -> loss, gradients in both sides


def forget_peak() -> bool:
    """Starts `peak` anew from what is resident now; whether the system can (Linux)."""
    gc.collect()
    # What compilation freed goes back to the system: the calls would fill it unseen.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')
    except OSError:
        return False
    return True


def peak() -> int:
    """The largest number of bytes of this process that were resident since `forget_peak`.

    Elsewhere than on Linux since the start: only what exceeds earlier peaks shows.
    """
    with contextlib.suppress(OSError), open('/proc/self/status') as file:
        for line in file:
            if line.startswith('VmHWM:'):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return available or 1


def jax_call(loss: str, variant: str, a: Any, b: Any) -> Call:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    import jax
    import jax.numpy as jnp

    from contrastive_jax import losses, parallel

    jax.config.update('jax_num_cpu_devices', PARTS.get(variant, 1))

    def unit(x):
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def dense_clip(a, b):
        logits = unit(a) @ unit(b).T / TEMPERATURE
        images = jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits)
        return (images.mean() + (jax.nn.logsumexp(logits, 0) - jnp.diagonal(logits)).mean()) / 2

    def dense_nt_xent(a, b):
        z = unit(jnp.concatenate([a, b]))
        scores = z @ z.T / TEMPERATURE
        positive = jnp.concatenate([jnp.diagonal(scores, len(a)), jnp.diagonal(scores, -len(a))])
        scores = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, scores)
        return (jax.nn.logsumexp(scores, 1) - positive).mean()

    function = {
        ('clip', 'ours'): lambda a, b: losses.clip(a, b, 1 / TEMPERATURE),
        ('clip', 'dense'): dense_clip,
        ('nt_xent', 'ours'): lambda a, b: losses.nt_xent(a, b, temperature=TEMPERATURE),
        ('nt_xent', 'dense'): dense_nt_xent,
    }[loss, variant.removesuffix('_sharded')]
    mesh = parallel.make_mesh()
    a, b = jax.device_put((a, b), parallel.rows(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(a, b).compile()

    def call() -> tuple[float, Any, Any]:
        value, (d_a, d_b) = jax.block_until_ready(compiled(a, b))
        return float(value), d_a, d_b

    return call


def torch_call(loss: str, variant: str, a: Any, b: Any) -> Call:
    import torch  # pyright: ignore[reportMissingImports]
    from torch import distributed  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import normalize  # pyright: ignore[reportMissingImports]

    ranks = PARTS.get(variant, 1)
    torch.set_num_threads(max(1, cores() // ranks))
    rank = 0
    if ranks > 1:
        distributed.init_process_group('gloo')
        rank = distributed.get_rank()
    # Every rank differentiates the whole loss, and the gathered gradients are the ranks' sum.
    a, b = (torch.from_numpy(x).chunk(ranks)[rank].clone().requires_grad_() for x in (a, b))
    if loss == 'clip':
        from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]

        clip = ClipLoss(gather_with_grad=True, rank=rank, world_size=ranks)

        def function(a, b):
            return clip(normalize(a), normalize(b), 1 / TEMPERATURE)
    else:
        from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]

        function = NTXentLoss(temperature=TEMPERATURE)  # normalises

    def call() -> tuple[float, Any, Any]:
        a.grad = b.grad = None
        value = function(a, b)
        value.backward()
        return float(value.detach()), a.grad / ranks, b.grad / ranks

    return call


def turn(loss: str, variant: str, B: int, D: int, repeats: int) -> dict[str, Any]:
    """Time and memory of one variant in this process, and numbers to check its results by."""
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((B, D), np.float32) for _ in range(2))
    if variant in TORCH:
        call = torch_call(loss, variant, a, b)
        packages = ['torch', TORCH[variant]]
    else:
        call = jax_call(loss, variant, a, b)
        packages = ['jax']
    exact = forget_peak()
    before = peak()
    result = call()
    wall, cpu = [], []
    while len(wall) < repeats and sum(wall) < SECONDS:
        del result  # as in training: gone before the next call
        start = time.perf_counter(), time.process_time()
        result = call()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    growth = peak() - before
    value, *gradients = result
    return {
        'seconds': statistics.median(wall),
        'cpu_seconds': statistics.median(cpu),
        'bytes': growth,
        'exact': exact,
        'result': [value, *(float(np.linalg.norm(np.asarray(d))) for d in gradients)],
        'packages': [f'{p} {importlib.metadata.version(p)}' for p in packages],
    }


def run(loss: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """`turn` in a process of its own."""
    python = args.peers if variant in TORCH else sys.executable
    sizes = f'--pairs={args.pairs}', f'--dimensions={args.dimensions}', f'--repeats={args.repeats}'
    command = [python, __file__, *sizes, '--turn', loss, variant]
    ranks = PARTS.get(variant, 1) if variant in TORCH else 1
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        where = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(s.getsockname()[1])}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **where, 'RANK': str(rank), 'WORLD_SIZE': str(ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    results = []
    for process, (out, error) in [(p, p.communicate()) for p in started]:
        if process.returncode:
            sys.exit(f'{loss}, {variant}: exit code {process.returncode}\n{error[-2000:]}')
        results.append(json.loads(out.splitlines()[-1]))
    total = dict(results[0])
    total['seconds'] = max(r['seconds'] for r in results)
    for column in ('cpu_seconds', 'bytes'):
        total[column] = sum(r[column] for r in results)
    losses, *norms = zip(*(r['result'] for r in results), strict=True)
    total['result'] = [losses[0], *(math.hypot(*n) for n in norms)]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--pairs', type=int, default=8192)
    parser.add_argument('--dimensions', type=int, default=512)
    parser.add_argument('--repeats', type=int, default=3, help='calls a turn, at least 1')
    parser.add_argument('--rounds', type=int, default=0, help='turns: 3, with --only 1')
    parser.add_argument('--peers', default='', help='a Python that has torch and the peers')
    parser.add_argument('--loss', choices=[*VARIANTS], help='one loss only')
    every = sorted({variant for variants in VARIANTS.values() for variant in variants})
    parser.add_argument('--only', choices=every, help='one variant only')
    parser.add_argument('--turn', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.only else 3)
    if min(args.pairs, args.dimensions, args.repeats, args.rounds) < 1:
        parser.error('--pairs, --dimensions, --repeats and --rounds must be at least 1')
    if args.turn:
        print(json.dumps(turn(*args.turn, args.pairs, args.dimensions, args.repeats)))
        return
    variants = [
        (loss, variant)
        for loss in ([args.loss] if args.loss else VARIANTS)
        for variant in VARIANTS[loss]
        if args.only in (None, variant) and (args.peers or variant not in TORCH)
    ]
    if not variants:
        parser.error('no such variant: open_clip (clip) and lightly (nt_xent) need --peers=PYTHON')
    runs: dict[tuple[str, str], list[dict]] = {v: [] for v in variants}
    for i in range(args.rounds):
        for v in variants[:: 1 - 2 * (i % 2)]:
            runs[v].append(run(*v, args))
    check(runs)
    report(runs, args)


def check(runs: dict[tuple[str, str], list[dict]]) -> None:
    """Exits unless all variants of a loss gave the same loss and the same lengths of gradients."""
    expected: dict[str, list[float]] = {}
    for (loss, variant), turns in runs.items():
        for got in (t['result'] for t in turns):
            want = expected.setdefault(loss, got)
            close = functools.partial(math.isclose, rel_tol=1e-4, abs_tol=1e-6)
            if not all(map(close, got, want)):
                sys.exit(f'{loss}, {variant}: (loss, |gradients|) is {got}, the first had {want}')


def report(runs: dict[tuple[str, str], list[dict]], args: argparse.Namespace) -> None:
    turns = [t for v in runs.values() for t in v]
    packages = sorted({p for t in turns for p in t['packages']})
    print(
        f'{args.pairs:,} pairs, D = {args.dimensions}, float32, {cores()} cores, '
        f'turns: {args.rounds}, calls a turn: up to {args.repeats}; {", ".join(packages)}\n'
    )
    print('| loss | variant | seconds | CPU seconds | peak memory, MiB |')
    print('|---|---|---|---|---|')
    for (loss, variant), mine in runs.items():
        numbers = [statistics.median(t[c] for t in mine) / unit for c, unit in COLUMNS.items()]
        print(f'| {loss} | {variant} |', ' | '.join(f'{x:.4g}' for x in numbers), '|')
    pairs = [
        (loss, one, other)
        for loss in VARIANTS
        for one, other in RATIOS
        if (loss, one) in runs and (loss, other) in runs
    ]
    if pairs:
        print('\n| ratio | seconds | CPU seconds | peak memory |')
        print('|---|---|---|---|')
    for loss, one, other in pairs:
        both = list(zip(runs[loss, one], runs[loss, other], strict=True))
        ratios = [_ratio([(x[c], y[c]) for x, y in both]) for c in COLUMNS]
        print(f'| {loss}: {one} / {other} |', ' | '.join(ratios), '|')
    if not all(t['exact'] for t in turns):
        print('\nPeak memory here is what exceeds the peak of compilation, so too little.')


def _ratio(turns: list[tuple[float, float]]) -> str:
    """The median of x / y, or a dash where a turn was too short, or grew too little, to tell."""
    return f'{statistics.median(x / y for x, y in turns):.2f}' if all(y for _, y in turns) else '–'


if __name__ == '__main__':
    main()
