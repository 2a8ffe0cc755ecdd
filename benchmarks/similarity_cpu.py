"""CLIP's loss, value and gradient, on this CPU: ours, dense JAX, and the peers' PyTorch code.

    python benchmarks/similarity_cpu.py                      # ours and dense JAX
    python -m venv peers
    peers/bin/pip install torch==2.14.1 torchvision==0.29.1 open_clip_torch lightly
    python benchmarks/similarity_cpu.py --peers=peers/bin/python
    python benchmarks/similarity_cpu.py --pairs=65536 --only=ours

Every variant runs in a process of its own, in turns, so that all see the same machine; the table
has the median time and CPU time of a call and the growth of the process's peak memory during
them, each also as a ratio to dense JAX.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

TORCH = """
import json, resource, sys, time, torch
B, D, repeats, which = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
a, b = (torch.randn(B, D, requires_grad=True) for _ in range(2))
if which == 'open_clip':
    from open_clip.loss import ClipLoss
    loss = ClipLoss()
    f = lambda: loss(torch.nn.functional.normalize(a), torch.nn.functional.normalize(b), 10.0)
else:
    from lightly.loss import NTXentLoss
    loss = NTXentLoss(temperature=0.1)
    f = lambda: loss(a, b)
def call():
    a.grad = b.grad = None
    value = f(); value.backward(); return float(value)
torch.ones(8, requires_grad=True).sum().backward()
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call()
times = []
for _ in range(repeats):
    t, c = time.perf_counter(), time.process_time()
    value = call()
    times.append((time.perf_counter() - t, time.process_time() - c))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({'times': times, 'bytes': (peak - base) * 1024, 'value': value}))
"""


def measure(which: str, B: int, D: int, repeats: int) -> dict:
    """One variant, in this process."""
    import jax
    import jax.numpy as jnp

    from contrastive_jax import losses

    def dense(a, b):
        a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        logits = 10.0 * a @ b.T
        images = jax.nn.logsumexp(logits, 1) - jnp.diagonal(logits)
        return (images.mean() + (jax.nn.logsumexp(logits, 0) - jnp.diagonal(logits)).mean()) / 2

    def dense_nt_xent(a, b):
        z = jnp.concatenate([a, b])
        z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        scores = 10.0 * z @ z.T
        positive = jnp.concatenate([jnp.diagonal(scores, B), jnp.diagonal(scores, -B)])
        scores = jnp.where(jnp.eye(2 * B, dtype=bool), -jnp.inf, scores)
        return (jax.nn.logsumexp(scores, 1) - positive).mean()

    loss = {
        'ours': lambda a, b: losses.clip(a, b, 10.0),
        'dense': dense,
        'ours nt_xent': lambda a, b: losses.nt_xent(a, b, temperature=0.1),
        'dense nt_xent': dense_nt_xent,
    }[which]
    a, b = jax.random.normal(jax.random.key(0), (2, B, D))
    call = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(a, b).compile()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(call(a, b))
    times = []
    for _ in range(repeats):
        t, c = time.perf_counter(), time.process_time()
        value, _ = jax.block_until_ready(call(a, b))
        times.append((time.perf_counter() - t, time.process_time() - c))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {'times': times, 'bytes': (peak - base) * 1024, 'value': float(value)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--pairs', type=int, default=8192)
    parser.add_argument('--dimensions', type=int, default=512)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--peers', default='', help='a Python that has torch and the peers')
    parser.add_argument('--only', default='', help='one variant, in this process')
    args = parser.parse_args()
    size = args.pairs, args.dimensions, args.repeats
    if args.only and args.rounds == 0:
        print(json.dumps(measure(args.only, *size)))
        return
    variants = ['dense', 'ours', 'dense nt_xent', 'ours nt_xent']
    if args.peers:
        variants += ['open_clip', 'lightly nt_xent']
    if args.only:
        variants = [args.only]
    runs: dict[str, list[dict]] = {v: [] for v in variants}
    for _ in range(args.rounds):
        for v in variants:
            if v in ('open_clip', 'lightly nt_xent'):
                command = [args.peers, '-c', TORCH, *map(str, size), v]
            else:
                flags = [f'--pairs={size[0]}', f'--dimensions={size[1]}', f'--repeats={size[2]}']
                command = [sys.executable, __file__, *flags, '--rounds=0', f'--only={v}']
            out = subprocess.run(command, capture_output=True, text=True)
            if out.returncode:
                sys.exit(f'{v}: {out.stderr[-2000:]}')
            runs[v].append(json.loads(out.stdout.splitlines()[-1]))
    print('| variant | seconds | CPU seconds | memory, MiB | seconds, CPU, memory / dense |')
    print('|---|---|---|---|---|')
    found = {}
    for v in variants:
        wall, cpu = zip(*[t for r in runs[v] for t in r['times']], strict=True)
        memory = min(r['bytes'] for r in runs[v])
        found[v] = statistics.median(wall), statistics.median(cpu), memory
    for v, (wall, cpu, memory) in found.items():
        base = found.get('dense nt_xent' if 'nt_xent' in v else 'dense')
        ratios = ''
        if base:
            ratios = ', '.join(
                f'{x / y:.2f}' for x, y in zip((wall, cpu, memory), base, strict=True)
            )
        print(f'| {v} | {wall:.2f} | {cpu:.2f} | {memory / 2**20:.0f} | {ratios} |')


if __name__ == '__main__':
    main()
