"""Training examples a second that the host makes, beside another commit's code.

    python benchmarks/input_pipeline.py --config=configs/simclr_vit.py
    python benchmarks/input_pipeline.py --config=configs/simclr_resnet.py:cifar10_small \
        --root=CIFAR10 --before=f7537c3
    python benchmarks/input_pipeline.py --config=configs/clip_vit.py:flickr8k --root=FLICKR8K

Batches are made as in training and thrown away; no network runs. The two commits take turns in
processes of their own, and the table gives each turn's examples a second and, in brackets, a CPU
second of all threads, and the median of the ratios: a machine's speed changes between turns more
than the code's does.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
# Runs in the code of either commit; the second branch is of commits before config.inputs.
FEED = """
import runpy, sys, time
import jax
path, preset, root, seconds = sys.argv[1:]
config = runpy.run_path(path)['get_config'](preset)
with config.unlocked():
    if root:
        config.data.root = root
        if config.data.source.startswith('tfds'):
            config.data.source = 'folder'
try:
    from contrastive_jax import data, experiment
    from contrastive_jax.data.bad_records import BadRecords
    from contrastive_jax.inputs import pipeline
    source = data.open_splits(config.data)['train']
    inputs = experiment.build_inputs(config)
    if inputs.prepare:
        inputs = inputs.prepare(source, [])
    iterator = pipeline.train_iterator(
        source, inputs.train, batch_size=config.batch_size, seed=0, bad=BadRecords(None, 100000)
    )
except ImportError:
    from contrastive_jax import parallel, program, train
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        iterator = train._iterator(config, program.build_parts(config, None, mesh))
for _ in range(4):
    next(iterator)
count, start, cpu = 0, time.perf_counter(), time.process_time()
while time.perf_counter() - start < float(seconds):
    next(iterator)
    count += config.batch_size
print(count / (time.perf_counter() - start), count / (time.process_time() - cpu))
"""


def speed(code: pathlib.Path, config: str, root: str, seconds: float) -> list[float]:
    path, _, preset = config.partition(':')
    command = [sys.executable, '-c', FEED, str(code / path), preset, root, str(seconds)]
    out = subprocess.run(
        command,
        cwd=code,
        env={**os.environ, 'PYTHONPATH': str(code), 'JAX_PLATFORMS': 'cpu'},
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(x) for x in out.stdout.split()[-2:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--config', required=True, help='FILE[:PRESET]')
    parser.add_argument('--root', default='', help="config.data.root; TFDS' sets as folders")
    parser.add_argument('--before', default='HEAD', help='a commit')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=10)
    options = parser.parse_args()
    given = options.config, options.root, options.seconds
    with tempfile.TemporaryDirectory() as folder:
        there = pathlib.Path(folder, 'code')
        git = ('git', '-C', str(ROOT), 'worktree')
        subprocess.run([*git, 'add', '--detach', str(there), options.before], check=True)
        try:
            print('| turn | before | here | ratio |\n|---|---|---|---|', flush=True)
            ratios = []
            for turn in range(options.turns):
                pair = speed(there, *given), speed(ROOT, *given)
                ratios.append([b / a for a, b in zip(*pair, strict=True)])
                cells = (f'{a:,.0f} ({b:,.0f})' for a, b in pair)
                ratio = '{:.2f} ({:.2f})'.format(*ratios[-1])
                print(f'| {turn + 1} | {" | ".join(cells)} | {ratio} |', flush=True)
            medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
            print('\nmedian of {} ratios: {:.3f} ({:.3f})'.format(options.turns, *medians))
        finally:
            subprocess.run([*git, 'remove', '--force', str(there)], check=True)


if __name__ == '__main__':
    main()
