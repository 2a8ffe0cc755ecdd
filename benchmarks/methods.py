"""Every method with the same small encoder, a few minutes each on 2 CPU cores.

    python benchmarks/methods.py OUT                                 # the embedded digits
    python benchmarks/methods.py OUT --preset=cifar10_small --root=ROOT
    python benchmarks/methods.py OUT --only=byol,swav --more='--config.seed=1'
    python benchmarks/methods.py OUT --jobs=2       # two at a time, each on its half of the cores

ROOT holds {train,test}/<class>/*.{jpg,png}. Runs the preset of every config (the ResNet of SimCLR's
two) into OUT/<config>, going on where an earlier call stopped, and prints a Markdown table: kNN of
the untrained and the trained encoder, the linear probe, images/s, minutes of training, and how
spread the features are (evals/collapse.py). Raw pixels are the same for all: they are said once.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys

from step_time import load

HERE = pathlib.Path(__file__).resolve().parents[1]
KNN = {'digits': {'k': 20, 'temperature': 0.07}, 'cifar10_small': {'k': 200, 'temperature': 0.1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=pathlib.Path)
    parser.add_argument('--preset', default='digits', choices=KNN)
    parser.add_argument('--root', default='', help='Of CIFAR-10 as folders.')
    parser.add_argument('--only', default='', help='Configs, separated by commas.')
    parser.add_argument('--more', default='', help='Flags for every run.')
    parser.add_argument('--jobs', type=int, default=1, help='Runs at a time; above 1 on Linux.')
    args = parser.parse_args()
    found = sorted(p.stem for p in (HERE / 'configs').glob('*.py') if p.stem != 'eval')
    images = [n for n in found if n != 'simclr_vit' and not load(n, 'digits').text]
    names = args.only.split(',') if args.only else images
    evals = {'knn': KNN[args.preset], 'collapse': {}, 'linear': {}}
    commands = []
    for name in names:
        command = [
            *(sys.executable, '-m', 'contrastive_jax.main'),
            *(f'--config=configs/{name}.py:{args.preset}', f'--workdir={args.out / name}'),
            *(f'--config.evals={evals}', *shlex.split(args.more)),
        ]
        if args.root:
            command += ['--config.data.source=folder', f'--config.data.root={args.root}']
        commands.append(command)
    run(commands, args.jobs)
    print(
        '\n| config | steps | minutes | images/s | kNN before | kNN | 10 a class: kNN | linear '
        '| linear | std | rank |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|---|')
    for name in names:
        print(row(name, args.out / name))
    records = read(args.out / names[0])
    pixels = {
        key: 100 * values(records, f'eval/{key}')[0]
        for key in ('knn/pixels_top1', 'linear/pixels_top1')
    }
    print('\nRaw pixels: ' + ', '.join(f'{k} {v:.1f} %' for k, v in pixels.items()))


def run(commands: list[list[str]], jobs: int) -> None:
    """Runs programs, `jobs` at a time, each of these on cores of its own.

    Raises:
        subprocess.CalledProcessError: one failed; those that had not begun are left out.
    """
    shares = iter(range(jobs))

    def pin() -> None:
        # A worker's thread, whose affinity its programs inherit, and with it their pools' size.
        if jobs > 1:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[next(shares) :: jobs])

    with concurrent.futures.ThreadPoolExecutor(jobs, initializer=pin) as pool:
        for done in [pool.submit(subprocess.run, c, cwd=HERE, check=True) for c in commands]:
            try:
                done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def read(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def values(records: list[dict], key: str) -> list[float]:
    return [r[key] for r in records if key in r]


def row(name: str, workdir: pathlib.Path) -> str:
    """One method's line; the time is that of training alone, without compilation."""
    records = read(workdir)
    batch = json.loads((workdir / 'config.json').read_text())['batch_size']
    seconds, last = 0.0, 1
    for record in records:
        if rate := record.get('train/images_per_second'):
            seconds += (record['step'] - last) * batch / rate
            last = record['step']
    knn = [f'{100 * v:.1f}' for v in values(records, 'eval/knn/top1')]
    ends = {
        key: values(records, f'eval/{key}')[-1]
        for key in ('knn/top1_10_per_class', 'linear/top1_10_per_class', 'linear/top1')
    }
    spread = {key: values(records, f'eval/collapse/{key}')[-1] for key in ('std', 'rank')}
    cells = [
        *(name, f'{last}', f'{seconds / 60:.1f}', f'{(last - 1) * batch / seconds:.0f}'),
        *(knn[0], knn[-1], *(f'{100 * v:.1f}' for v in ends.values())),
        *(f'{spread["std"]:.2f}', f'{spread["rank"]:.0f}'),
    ]
    return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
    main()
