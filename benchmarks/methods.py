"""Every method with the same small encoder, a few minutes each on 2 CPU cores.

    python benchmarks/methods.py OUT                                 # the embedded digits
    python benchmarks/methods.py OUT --preset=cifar10_small --root=ROOT
    python benchmarks/methods.py OUT --only=byol,swav --more='--config.seed=1'
    python benchmarks/methods.py OUT --jobs=2       # two at a time, each on its half of the cores
    python benchmarks/methods.py OUT --only=mae,rotation --depth    # probes of every layer, too

ROOT holds {train,test}/<class>/*.{jpg,png}. Runs the preset of every config (the ResNet of SimCLR's
two) into OUT/<config>, going on where an earlier call stopped, and looks at each when it has ended.
Prints a Markdown table: kNN of the untrained and the trained encoder, the linear probe, both with
10 labels a class and 1 % of them, the method's own task, images/s, minutes of training, and how
spread the features are (evals/collapse.py). Raw pixels are the same for all, so they are looked at
once. --depth prints a second table, of linear probes of all blocks or stages before and after
training, and draws OUT/depth_<number of them>.png.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

import jax
from step_time import load

from contrastive_jax import config as config_lib
from contrastive_jax import figures, inference
from contrastive_jax.workdir import records

HERE = pathlib.Path(__file__).resolve().parents[1]
LOOKED, LAYERS = 'looked.json', 'layers.json'
FEW = {'fractions': (0.01,)}
SPECS = {'knn': FEW, 'linear': FEW, 'collapse': {}, 'pretext': {}}
OUTPUTS = ('stage*', 'block*', 'features')
DEPTH = {'linear': {'outputs': OUTPUTS, 'dimensions': 512, 'per_class': ()}}
NONE = 'eval', 'finetune'  # configs that train no encoder from the start
NAMES = {'before': 'untrained', 'after': 'trained'}
HEADS = ('config', 'steps', 'minutes', 'images/s', 'kNN, untrained', 'kNN', 'linear')
HEADS += ('10 a class: kNN', 'linear', '1 %: kNN', 'linear', 'its own task', 'std / rank')
KNN = {'digits': {'k': 20, 'temperature': 0.07}, 'cifar10_small': {'k': 200, 'temperature': 0.1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=pathlib.Path)
    parser.add_argument('--preset', default='digits', choices=KNN)
    parser.add_argument('--root', default='', help='Of CIFAR-10 as folders.')
    parser.add_argument('--only', default='', help='Configs, separated by commas.')
    parser.add_argument('--more', default='', help='Flags for every run.')
    parser.add_argument('--jobs', type=int, default=1, help='Runs at a time; above 1 on Linux.')
    parser.add_argument('--depth', action='store_true', help='Probes of every layer, too.')
    parser.add_argument('--look', help=argparse.SUPPRESS)
    parser.add_argument('--pixels', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look:
        workdir, states = args.out / args.look, ('before', 'after')
        specs = {**SPECS, 'knn': {**FEW, **KNN[args.preset]}}
        look(workdir, LOOKED, specs, (*states, 'pixels') if args.pixels else states)
        if args.depth:
            look(workdir, LAYERS, DEPTH, states)
        return
    if args.jobs > 1 and args.jobs > (cores := len(os.sched_getaffinity(0))):
        parser.error(f'--jobs: got {args.jobs}; expected at most one a core, of which are {cores}.')
    stems = sorted(p.stem for p in (HERE / 'configs').glob('*.py') if p.stem not in NONE)
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
        after += ['--depth'] if args.depth else []
        commands.append((train, [*after, '--pixels'] if name == names[0] else after))
    run(commands, args.jobs)
    table(HEADS, [row(name, args.out / name) for name in names])
    pixels = found(args.out / names[0], LOOKED)['pixels']
    shares = (f'{key} {100 * v:.1f} %' for key, v in pixels.items() if 'top1' in key)
    print('\nRaw pixels: ' + ', '.join(shares))
    if args.depth:
        by_depth({name: found(args.out / name, LAYERS) for name in names}, args.out)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for cells in (heads, ['---'] * len(heads), *rows):
        print(f'| {" | ".join(cells)} |')


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


def look(workdir: pathlib.Path, name: str, specs: dict, states: Sequence[str]) -> None:
    """Writes a file into a run that has ended, unless all is there: state -> evaluator -> value."""
    known = found(workdir, name)
    if {*states} <= {*known}:
        return
    experiment, trained = inference.open_run(str(workdir))
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
        for state in states:
            known[state] = {}
            for evaluator, options in specs.items():
                if state == 'before' and name == LOOKED and evaluator != 'knn':
                    continue  # much the same of all
                where = f'config.evals.{evaluator}'
                evaluate = config_lib.build('evals', {'name': evaluator, **options}, where)
                for key, value in evaluate(encoders[state]):
                    if not isinstance(value, bytes):
                        known[state][f'{evaluator}/{key}'] = float(value)
            print(f'{workdir}, {state}: {known[state]}', flush=True)
    (workdir / name).write_text(json.dumps(known))


def found(workdir: pathlib.Path, name: str) -> dict[str, dict[str, float]]:
    path = workdir / name
    return json.loads(path.read_text()) if path.exists() else {}


def row(name: str, workdir: pathlib.Path) -> list[str]:
    """One method's line; the time is that of training alone, without compilation."""
    batch = json.loads((workdir / 'config.json').read_text())['batch_size']
    seconds, last = 0.0, 1
    for record in records.read(str(workdir)):
        if rate := record.get('train/examples_per_second'):
            seconds += (record['step'] - last) * batch / rate
            last = record['step']
    looked = found(workdir, LOOKED)
    before, after = looked['before'], looked['after']
    asked = [f'{key.split("/")[1]} {100 * v:.1f}' for key, v in after.items() if 'pretext' in key]
    return [
        *(name, f'{last} of {batch}', f'{seconds / 60:.1f}'),
        f'{(last - 1) * batch / seconds:.0f}',
        f'{100 * before["knn/top1"]:.1f}',
        *(
            f'{100 * after[f"{evaluator}/top1{few}"]:.1f}'
            for few in ('', '_10_per_class', '_1_percent')
            for evaluator in ('knn', 'linear')
        ),
        ', '.join(asked) or '–',
        f'{after["collapse/std"]:.2f} / {after["collapse/rank"]:.0f}',
    ]


def by_depth(layers: dict[str, dict[str, dict[str, float]]], out: pathlib.Path) -> None:
    """Prints the probes of every layer; draws those of runs that have as many."""
    lines: dict[int, dict[str, list[float]]] = {}
    for name, states in layers.items():
        for state, values in states.items():
            top1 = {key: v for key, v in values.items() if key.endswith('top1')}
            ends = [top1.pop('linear/top1')]
            line = [100 * v for v in [*top1.values(), *ends]]
            lines.setdefault(len(line), {})[f'{name}, {NAMES[state]}'] = line
    for count, of_runs in lines.items():
        heads = ['config', *(f'layer {i}' for i in range(1, count)), 'features']
        print()
        table(heads, [[name, *(f'{v:.1f}' for v in line)] for name, line in of_runs.items()])
        picture = figures.depth(of_runs, heads[1:], 'linear probe')
        (out / f'depth_{count}.png').write_bytes(picture)


if __name__ == '__main__':
    main()
