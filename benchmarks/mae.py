"""Speed that MAE gains where its encoder sees a quarter of the patches, as a ratio.

    python benchmarks/mae.py [--size=S] [--side=224] [--batch=4] [--decoder=256,4,8] [--turns=3]

A training step with 75 % of the patches hidden beside that of the autoencoder that sees them all,
with the same encoder (patch 16), decoder (width, depth, heads) and optimiser, on random images. The
two take turns in one process; the first step of each turn does not count. Beside the times are the
floating-point operations that the compiler counts. Ratios of median and fastest that differ much
say that the machine was not quiet.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from contrastive_jax import optim, state
from contrastive_jax.methods import mae
from contrastive_jax.models import vit

TURN = 4  # steps, of which the first does not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', default='S')
    parser.add_argument('--side', type=int, default=224)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--decoder', default='256,4,8', help='Width, depth and heads.')
    parser.add_argument('--turns', type=int, default=3)
    args = parser.parse_args()
    width, depth, heads = map(int, args.decoder.split(','))
    views = np.random.default_rng(0).normal(size=(args.batch, 1, args.side, args.side, 3))
    batch = {'views': views.astype(np.float32)}
    tx, _ = optim.make(name='adamw', learning_rate=1e-4, total_steps=1000, batch_size=256)
    runs = {}
    for name, ratio in (('all patches', 0.0), ('a quarter', 0.75)):
        model = vit.make(size=args.size, patch=16, start='mae')
        method = mae.make(model, mask_ratio=ratio, width=width, depth=depth, heads=heads)
        start = jax.jit(state.make_init(method, tx, 0, 1000))(batch)
        step = jax.jit(state.make_step(method, tx, lambda key, batch: batch, 0, 1000))
        step = step.lower(start, batch).compile()
        runs[name] = {'step': step, 'state': start, 'times': []}
    for _ in range(args.turns):
        for run in runs.values():
            for i in range(TURN):
                begin = time.perf_counter()
                run['state'], metrics = run['step'](run['state'], batch)
                jax.block_until_ready(metrics)
                if i:
                    run['times'].append(time.perf_counter() - begin)
    seconds = [statistics.median(run['times']) for run in runs.values()]
    fastest = [min(run['times']) for run in runs.values()]
    flops = [run['step'].cost_analysis()['flops'] for run in runs.values()]
    print(f'ViT-{args.size}/16, {args.side} pixels, decoder {args.decoder}, batch {args.batch}, '
          f'{jax.devices()[0].device_kind}\n')  # fmt: skip
    print('| encoder sees | s a step | G operations |\n|---|---|---|')
    for name, s, n in zip(runs, seconds, flops, strict=True):
        print(f'| {name} | {s:.3f} | {n / 1e9:.1f} |')
    ratios = [a / b for a, b in (seconds, fastest, flops)]
    print('\nmedian {:.2f} ×, fastest {:.2f} ×, operations {:.2f} ×'.format(*ratios))


if __name__ == '__main__':
    main()
