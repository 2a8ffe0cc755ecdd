"""Accuracy in a pretext task against a linear probe's on its features, as a run goes on.

    python benchmarks/pretext.py OUT            # the embedded digits, some minutes of 2 CPU cores
    python benchmarks/pretext.py OUT --only=rotation --more='--config.seed=1'

Runs every config whose method asks something of single records (`Method.task`) into OUT/<config>,
going on where an earlier call stopped, and evaluates it nine times. Prints a Markdown table and
draws OUT/pretext.png: each curve is a run, from its first evaluation to its last one, which has the
large mark; solid for a linear probe of the features, dashed for one of the first stage or block.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys

from step_time import load

from contrastive_jax.figures import COLOURS, write
from contrastive_jax.figures.style import FAINT, GREY, INK, png
from contrastive_jax.workdir import records

HERE = pathlib.Path(__file__).resolve().parents[1]
TASK, PROBE = 'eval/pretext/accuracy', 'eval/linear/{}top1'
EARLY = 'stage1_', 'block0_', 'block1_'
EVALUATIONS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=pathlib.Path)
    parser.add_argument('--only', default='', help='Configs, separated by commas.')
    parser.add_argument('--more', default='', help='Flags for every run.')
    args = parser.parse_args()
    configs = sorted(p.stem for p in (HERE / 'configs').glob('*.py') if p.stem != 'eval')
    asked = [name for name in configs if 'pretext' in load(name, 'digits').evals]
    names = args.only.split(',') if args.only else asked
    runs = {}
    for name in names:
        steps = load(name, 'digits').total_steps
        command = [
            *(sys.executable, '-m', 'contrastive_jax.main'),
            *(f'--config=configs/{name}.py', f'--workdir={args.out / name}'),
            f'--config.eval_every={steps // EVALUATIONS}',
            *shlex.split(args.more),
        ]
        subprocess.run(command, cwd=HERE, check=True)
        runs[name] = [r for r in records.read(str(args.out / name)) if TASK in r]
    table(runs)
    write(drawn(runs), args.out / 'pretext.png')


def probes(record: dict) -> list[float]:
    """The probe of the features and, where there is one, of the first stage or block; in %."""
    keys = [PROBE.format(name) for name in ('', *EARLY)]
    return [100 * record[key] for key in keys if key in record][:2]


def table(runs: dict[str, list[dict]]) -> None:
    print('\n| config | step | task (%) | linear, features | linear, first stage |')
    print('|---|---|---|---|---|')
    for name, found in runs.items():
        for r in found:
            cells = [100 * r[TASK], *probes(r)]
            print(f'| {name} | {r["step"]} | {" | ".join(f"{v:.1f}" for v in cells)} |')


def drawn(runs: dict[str, list[dict]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), dpi=120, layout='constrained')
    axis = figure.subplots()
    axis.set_xlabel("the method's own task (%)", color=GREY, fontsize=9)
    axis.set_title('linear probe (%)', loc='left', fontsize=10.5, color=INK)
    axis.grid(color=FAINT, lw=0.8)
    axis.tick_params(colors=GREY, length=0, labelsize=9)
    for side in ('top', 'right', 'left', 'bottom'):
        axis.spines[side].set_visible(False)
    for colour, (name, found) in zip(COLOURS, runs.items(), strict=False):
        task = [100 * r[TASK] for r in found]
        for way, line in zip(('-', '--'), zip(*map(probes, found), strict=True), strict=False):
            label = name.replace('_', ' ') if way == '-' else None
            axis.plot(task, line, way, marker='o', ms=3, lw=1.4, color=colour, label=label)
            axis.plot(task[-1:], line[-1:], 'o', ms=9, color=colour)
    figure.legend(frameon=False, fontsize=9, labelcolor=INK, loc='outside right upper')
    return png(figure)


if __name__ == '__main__':
    main()
