"""Every method with the same small encoder, a few minutes each on 2 CPU cores.

    python benchmarks/methods.py OUT                                 # the embedded digits
    python benchmarks/methods.py OUT --preset=cifar10_small --root=ROOT
    python benchmarks/methods.py OUT --only=byol,swav --more='--config.seed=1'
    python benchmarks/methods.py OUT --jobs=2       # two at a time, each on its half of the cores

ROOT holds {train,test}/<class>/*.{jpg,png}. Runs the preset of every config (the ResNet of SimCLR's
two) into OUT/<config>, going on where an earlier call stopped, and looks at each when it has ended.
Prints a Markdown table: kNN of the untrained and the trained encoder, the linear probe, images/s,
minutes of training, and how spread the features are (evals/collapse.py). Raw pixels are the same
for all, so they are looked at once.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys

import jax
from step_time import load

from contrastive_jax import config as config_lib
from contrastive_jax import inference
from contrastive_jax.workdir import records

HERE = pathlib.Path(__file__).resolve().parents[1]
LOOKED = 'looked.json'
PIXELS = ('knn/top1', 'linear/top1')
KNN = {'digits': {'k': 20, 'temperature': 0.07}, 'cifar10_small': {'k': 200, 'temperature': 0.1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=pathlib.Path)
    parser.add_argument('--preset', default='digits', choices=KNN)
    parser.add_argument('--root', default='', help='Of CIFAR-10 as folders.')
    parser.add_argument('--only', default='', help='Configs, separated by commas.')
    parser.add_argument('--more', default='', help='Flags for every run.')
    parser.add_argument('--jobs', type=int, default=1, help='Runs at a time; above 1 on Linux.')
    parser.add_argument('--look', help=argparse.SUPPRESS)
    parser.add_argument('--pixels', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        look(args.out / args.look, KNN[args.preset], pixels=args.pixels)
        return
    if args.jobs > 1 and args.jobs > (cores := len(os.sched_getaffinity(0))):
        parser.error(f'--jobs: got {args.jobs}; expected at most one a core, of which are {cores}.')
    stems = sorted(p.stem for p in (HERE / 'configs').glob('*.py') if p.stem != 'eval')
    images = [n for n in stems if n != 'simclr_vit' and not load(n, 'digits').text]
    names = args.only.split(',') if args.only else images
    commands = []
    for name in names:
        train = [
            *(sys.executable, '-m', 'contrastive_jax.main'),
            *(f'--config=configs/{name}.py:{args.preset}', f'--workdir={args.out / name}'),
            *('--config.evals={}', *shlex.split(args.more)),
        ]
        if args.root:
            train += ['--config.data.source=folder', f'--config.data.root={args.root}']
        after = [sys.executable, __file__, str(args.out), f'--preset={args.preset}', '--look', name]
        commands.append((train, [*after, '--pixels'] if name == names[0] else after))
    run(commands, args.jobs)
    print(
        '\n| config | steps | minutes | images/s | kNN before | kNN | 10 a class: kNN | linear '
        '| linear | std | rank |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|---|')
    for name in names:
        print(row(name, args.out / name))
    pixels = found(args.out / names[0])['pixels']
    print('\nRaw pixels: ' + ', '.join(f'{k} {100 * pixels[k]:.1f} %' for k in PIXELS))


def run(commands: list[tuple[list[str], ...]], jobs: int) -> None:
    """Runs groups of programs, `jobs` groups at a time, each of these on cores of its own.

    Raises:
        subprocess.CalledProcessError: one failed; those that had not begun are left out.
    """
    shares = iter(range(jobs))

    def pin() -> None:
        # A worker's thread, whose affinity its programs inherit, and with it their pools' size.
        if jobs > 1:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[next(shares) :: jobs])

    def one(group: tuple[list[str], ...]) -> None:
        for command in group:
            subprocess.run(command, cwd=HERE, check=True)

    with concurrent.futures.ThreadPoolExecutor(jobs, initializer=pin) as pool:
        for done in [pool.submit(one, group) for group in commands]:
            try:
                done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def look(workdir: pathlib.Path, knn: dict, *, pixels: bool) -> None:
    """Writes LOOKED into a run that has ended, unless all is there: state -> evaluator -> value."""
    known = found(workdir)
    wanted = {'before', 'after', *(['pixels'] if pixels else [])}
    if wanted <= {*known}:
        return
    experiment, trained = inference.open_run(str(workdir))
    specs = {'knn': knn, 'collapse': {}, 'linear': {}}
    with jax.set_mesh(experiment.mesh):
        encoders = {'after': trained}
        encoders['before'] = inference.subject(experiment, experiment.init())
        encoders['pixels'] = inference.baseline(
            experiment.inputs,
            experiment.splits,
            experiment.mesh,
            experiment.config.batch_size,
            experiment.bad,
        )
        for state in sorted(wanted - {*known}):
            known[state] = {}
            for name, options in specs.items():
                if state == 'before' and name != 'knn':
                    continue
                evaluate = config_lib.build('evals', {'name': name, **options}, f'evals.{name}')
                for key, value in evaluate(encoders[state]):
                    if not isinstance(value, bytes):
                        known[state][f'{name}/{key}'] = float(value)
            print(f'{workdir}, {state}: {known[state]}', flush=True)
    (workdir / LOOKED).write_text(json.dumps(known))


def found(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    path = workdir / LOOKED
    return json.loads(path.read_text()) if path.exists() else {}


def row(name: str, workdir: pathlib.Path) -> str:
    """One method's line; the time is that of training alone, without compilation."""
    batch = json.loads((workdir / 'config.json').read_text())['batch_size']
    seconds, last = 0.0, 1
    for record in records.read(str(workdir)):
        if rate := record.get('train/examples_per_second'):
            seconds += (record['step'] - last) * batch / rate
            last = record['step']
    looked = found(workdir)
    before, after = looked['before'], looked['after']
    ends = ('knn/top1', 'knn/top1_10_per_class', 'linear/top1_10_per_class', 'linear/top1')
    cells = [
        *(name, f'{last}', f'{seconds / 60:.1f}', f'{(last - 1) * batch / seconds:.0f}'),
        *(f'{100 * v:.1f}' for v in (before['knn/top1'], *(after[k] for k in ends))),
        *(f'{after["collapse/std"]:.2f}', f'{after["collapse/rank"]:.0f}'),
    ]
    return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
    main()
