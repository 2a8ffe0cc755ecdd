"""Whether runs hang on a CPU: many short ones, each in a process of its own.

    python benchmarks/cpu_starts.py [OUT] [--starts=50] [--only=3,17] [--patience=300] [--code=DIR]

Three training steps and evaluations of the embedded digits by several methods, encoders,
optimisers, evaluators and batch sizes on 2, 4 and 8 virtual devices, with XLA's default flags; the
first ten are two cases that hung, see docs/troubleshooting.md. A start that prints nothing for
`patience` seconds is killed. Each is a row of the table: seconds, exit code, whether it hung, and
in how many of its programs a collective may overtake another one's loop (`planning.hlo`): where
that is 0, XLA could not have hung. The exit code is 1 where anything is wrong.
"""

import argparse
import os
import pathlib
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from contrastive_jax.planning import hlo

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESNET_18 = {'name': 'resnet', 'size': '18', 'stem': 'cifar'}
MODELS = {
    'resnet': {'name': 'resnet', 'stem': 'cifar', 'widths': (32, 64), 'blocks': (1, 1)},
    'resnet-18': RESNET_18,
    'vit': {'name': 'vit', 'width': 96, 'depth': 2, 'heads': 3, 'patch': 4, 'pool': 'cls'},
}
OPTIMISERS = {'adamw': 1e-3, 'sgd': 0.1, 'lars': 0.5, 'lamb': 1e-3}
EVALUATORS = {
    'knn': {},
    'linear': {},
    'uniformity': {},
    'collapse': {},
    'clustering': {},
    'finetune': {'epochs': 1.0, 'min_steps': 2, 'draws': 1, 'learning_rates': (1e-3,)},
}
METHODS = ('simclr', 'byol', 'dino', 'moco', 'swav', 'vicreg', 'barlow_twins', 'nnclr', 'pcl')
# Of 4 micro-batches each: queues and centres are then written in a loop.
BATCHES = {'32': (32, 1), '64': (64, 1), '128': (128, 1), '128 in 4': (128, 4)}
Start = tuple[str, int, list[str]]  # title, devices, flags


def starts(count: int, images: pathlib.Path) -> Iterator[Start]:
    """Two cases that hung, five times each, and then a sample of all that could be combined."""
    config = 'configs/simclr_resnet.py'
    digits = ('--config.inputs.size=32', f'--config.model={RESNET_18}', '--config.evals={}')
    folder = ('--config.data.source=folder', f'--config.data.root={images}')
    for _ in range(5):
        yield 'simclr, resnet-18, adamw, 64', 2, [f'--config={config}', *digits]
        yield 'cifar10_small, a folder', 8, [f'--config={config}:cifar10_small', *folder]
    draw = random.Random(0)
    # In turn, so that each comes equally often, and drawn, so that they meet each other.
    turns = [[*METHODS], [*MODELS], [*OPTIMISERS], [*EVALUATORS], [*BATCHES], [2, 4, 8]]
    left: list[list] = [[] for _ in turns]
    for _ in range(count - 10):
        for mine, every in zip(left, turns, strict=True):
            if not mine:
                mine += draw.sample(every, len(every))
        method, model, optimiser, evaluator, batch, devices = (mine.pop() for mine in left)
        file = next(
            p for p in (f'{method}.py', f'{method}_vit.py') if (ROOT / 'configs' / p).exists()
        )
        size, accumulate = BATCHES[batch]
        optim = {'name': optimiser, 'learning_rate': OPTIMISERS[optimiser]}
        flags = [
            f'--config=configs/{file}',
            f'--config.model={MODELS[model]}',
            f'--config.optim={optim}',
            f'--config.evals={ {evaluator: EVALUATORS[evaluator]} }',
            f'--config.batch_size={size}',
            f'--config.accumulate={accumulate}',
        ]
        yield f'{method}, {model}, {optimiser}, {batch}, {evaluator}', devices, flags


def make_images(root: pathlib.Path) -> pathlib.Path:
    """A folder in the layout of CIFAR-10, of noise."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 64), ('test', 16)):
        for name in 'abcd':
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f'{i}.png')
    return root


def run(
    code: pathlib.Path, devices: int, flags: list[str], out: pathlib.Path, patience: float
) -> tuple[int, bool, str]:
    """One start: its exit code, whether it hung, and what it printed."""
    xla = f'--xla_force_host_platform_device_count={devices}'
    process = subprocess.Popen(
        [
            *(sys.executable, '-m', 'contrastive_jax.main', *flags, f'--workdir={out / "run"}'),
            *('--config.total_steps=3', '--config.log_every=1', '--config.eval_every=0'),
        ],
        cwd=code,
        # A program from the cache would not be written out.
        env={
            **os.environ,
            'PYTHONPATH': str(code),
            'JAX_PLATFORMS': 'cpu',
            'JAX_ENABLE_COMPILATION_CACHE': 'false',
            'XLA_FLAGS': f'{xla} --xla_dump_to={out / "programs"}',
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    printed, silent = [], False
    while not silent:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            silent = True
            process.kill()
            continue
        if line is None:
            break
        printed.append(line)
    text = ''.join(printed)
    return process.wait(), silent or 'Termination timeout' in text, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', nargs='?', type=pathlib.Path, help='For what starts print.')
    parser.add_argument('--starts', type=int, default=50)
    parser.add_argument('--only', default='', help='Numbers of starts, separated by commas.')
    parser.add_argument('--patience', type=float, default=300, help='Seconds.')
    parser.add_argument('--code', type=pathlib.Path, default=ROOT, help='A checkout.')
    args = parser.parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    only = {int(n) for n in args.only.split(',') if n}
    print('| # | run | devices | seconds | exit code | hung | programs | may hang |')
    print('|---|---|---|---|---|---|---|---|')
    count = hangs = failed = doubtful = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        listed = starts(args.starts, make_images(folder / 'images'))
        for number, (title, devices, flags) in enumerate(listed, 1):
            if only and number not in only:
                continue
            out = folder / 'start'
            begun = time.monotonic()
            exit_code, hung, printed = run(args.code.resolve(), devices, flags, out, args.patience)
            seconds = time.monotonic() - begun
            programs = [p.read_text() for p in out.glob('programs/*after_optimizations.txt')]
            may_hang = sum(bool(hlo.overtaking(text)) for text in programs)
            shutil.rmtree(out, ignore_errors=True)
            if args.out:
                (args.out / f'{number}.log').write_text(printed)
            count, hangs, failed = count + 1, hangs + hung, failed + (exit_code != 0)
            doubtful += may_hang > 0
            cells = number, title, devices, f'{seconds:.0f}', exit_code, 'yes' if hung else 'no'
            print(f'| {" | ".join(map(str, (*cells, len(programs), may_hang)))} |', flush=True)
            if exit_code and not hung:
                print(re.sub(r'^', '    ', printed[-2000:], flags=re.MULTILINE), file=sys.stderr)
    print(f'\n{count} starts, {hangs} hung, {failed} failed, {doubtful} had programs that may hang')
    sys.exit(bool(hangs or failed or doubtful))


if __name__ == '__main__':
    main()
