"""Cost of a method beyond its encoder: the time of a training step, as a ratio to SimCLR's.

    python benchmarks/step_time.py [--preset=cifar10_small] [--only=moco,byol] [--turns=6]

Every method's step of the preset, with one encoder and batch for all (the ResNet of SimCLR's
config; a small ViT where a method needs tokens, beside SimCLR with that one), on random images that
lie on the device. The methods take turns of four steps in one process; the first of a turn, which
follows another method's, does not count. The table has the median and the fastest step: ratios that
differ much say that the machine was not quiet.
"""

import argparse
import pathlib
import runpy
import statistics
import time

import jax
import numpy as np

from contrastive_jax import experiment, parallel
from contrastive_jax.config import UserError

TURN = 4  # steps, of which the first does not count
CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


def load(name: str, preset: str):
    return runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config'](preset)


def prepare(name: str, preset: str, model, batch: int, mesh) -> dict:
    config = load(name, preset)
    with config.unlocked():
        config.model, config.batch_size = model, batch
    built = experiment.build(config, mesh, 50_000)
    rng = np.random.default_rng(0)

    def random(x):
        low, high = (0, 256) if x.dtype == np.uint8 else (0, 10)
        return rng.integers(low, high, x.shape).astype(x.dtype)

    data = parallel.shard_batch(mesh, jax.tree.map(random, built.batch))
    state, _ = built.step(built.init(), data)
    return {'step': built.step, 'state': state, 'data': data, 'times': []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', default='cifar10_small')
    parser.add_argument('--only', default='', help='Configs, separated by commas.')
    parser.add_argument('--turns', type=int, default=6)
    args = parser.parse_args()
    names = args.only.split(',') if args.only else sorted(p.stem for p in CONFIGS.glob('*.py'))
    others = ('simclr_resnet', 'simclr_vit', 'eval', 'finetune')
    names = [n for n in names if n not in others and not load(n, 'digits').text]
    mesh = parallel.make_mesh()
    resnet, tokens = (load(f'simclr_{m}', args.preset) for m in ('resnet', 'vit'))
    tokens.model.pool = 'cls'
    with jax.set_mesh(mesh):
        runs, against = {}, {}
        batch = resnet.batch_size
        for name in ('simclr_resnet', 'simclr_vit', *names):
            base = 'simclr_resnet'
            if name == 'simclr_vit':
                base = name
            try:
                model = (resnet if base == 'simclr_resnet' else tokens).model
                runs[name] = prepare(name, args.preset, model, batch, mesh)
            except UserError:
                base = 'simclr_vit'
                runs[name] = prepare(name, args.preset, tokens.model, batch, mesh)
            against[name] = base
        for _ in range(args.turns):
            for run in runs.values():
                for i in range(TURN):
                    start = time.perf_counter()
                    run['state'], metrics = run['step'](run['state'], run['data'])
                    jax.block_until_ready(metrics)
                    if i:
                        run['times'].append(time.perf_counter() - start)
    times = {name: (statistics.median(r['times']), min(r['times'])) for name, r in runs.items()}
    counted = (TURN - 1) * args.turns
    print(f'{batch} images, {counted} steps, {jax.devices()[0].device_kind} x {mesh.size}\n')
    print('| method | ms a step | of SimCLR: median | fastest | with the encoder of |')
    print('|---|---|---|---|---|')
    for name, both in times.items():
        middle, fastest = (a / b for a, b in zip(both, times[against[name]], strict=True))
        ms = 1000 * both[0]
        print(f'| {name} | {ms:.0f} | {middle:.2f} | {fastest:.2f} | {against[name]} |')


if __name__ == '__main__':
    main()
