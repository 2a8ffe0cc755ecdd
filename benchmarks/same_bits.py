"""Whether a change of the code changes what it computes: two runs before and after, bit for bit.

    python benchmarks/same_bits.py --before=f7537c3

SimCLR on digits (60 steps) and CLIP on grids of digits (30 steps) are trained by the code of the
commit `before`, in a work tree of its own, and by the code around this file. All numbers of their
metrics.jsonl, speeds aside, and all bits of their newest checkpoints must be equal. Then the code
here continues what the other one had in the middle of its run, which must end in the same bits, and
evaluates its end, which must give the same numbers. The exit code is 1 where anything differs.
`--ignore=eval/linear/` passes over metrics that are meant to change.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RUNS = {
    'simclr': ('configs/simclr_vit.py', 60),
    'clip': ('configs/clip_vit.py', 30),
}


def train(code: pathlib.Path, workdir: pathlib.Path, config: str, *flags: str) -> None:
    command = [sys.executable, '-m', 'contrastive_jax.main', f'--config={config}', *flags]
    subprocess.run(
        [*command, f'--workdir={workdir}'],
        cwd=code,
        env={**os.environ, 'PYTHONPATH': str(code), 'PYTHONDONTWRITEBYTECODE': '1'},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def metrics(workdir: pathlib.Path, ignore: str | None) -> list[dict[str, Any]]:
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()

    def kept(key: str) -> bool:
        return not key.endswith('_per_second') and not (ignore and re.match(ignore, key))

    # A commit may be older than these names.
    found = [
        {k.replace('/pixels_', '/baseline_'): v for k, v in json.loads(x).items()} for x in lines
    ]
    return [{k: v for k, v in record.items() if kept(k)} for record in found]


def arrays(workdir: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    path = epath.Path(newest(workdir)) / 'state'
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
    how = ocp.checkpoint_utils.construct_restore_args(like)
    found = handler.restore(path, args=ocp.args.PyTreeRestore(item=like, restore_args=how))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {
        jax.tree_util.keystr(k): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for k, x in leaves
    }


def newest(workdir: pathlib.Path) -> pathlib.Path:
    return max((workdir / 'checkpoints').glob('[0-9]*'), key=lambda p: int(p.name))


def is_end(record: dict[str, Any]) -> bool:
    """Whether it is of an evaluation of what was trained."""
    return record['step'] > 0 and any(key.startswith('eval/') for key in record)


def of_steps(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """All numbers of every step."""
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        found.setdefault(record['step'], {}).update(record)
    return found


def compare(name: str, before: pathlib.Path, after: pathlib.Path, ignore: str | None) -> bool:
    """Prints what differs between two workdirs, and whether anything does."""
    values = [of_steps(metrics(w, ignore)) for w in (before, after)]
    # A run that was continued has also logged its first step after that.
    keys = [
        f'step {step}, {k}: before {found.get(k)}, after {values[1][step].get(k)}'
        for step, found in values[0].items()
        for k in found.keys() | values[1][step].keys()
        if found.get(k) != values[1][step].get(k)
    ]
    bits = [arrays(w) for w in (before, after)]
    names = [k for k in bits[0].keys() | bits[1].keys() if bits[0].get(k) != bits[1].get(k)]
    print(
        f'{name}: {sum(map(len, values[0].values()))} numbers, {len(keys)} differ; '
        f'{len(bits[0])} arrays, {len(names)} differ'
    )
    for line in [*sorted(keys), *sorted(names)][:20]:
        print(f'  {line}')
    return bool(keys or names)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--before', default='HEAD', help='a commit')
    parser.add_argument('--ignore', help='a regular expression of metrics that may differ')
    options = parser.parse_args()
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        there, out = pathlib.Path(folder, 'code'), pathlib.Path(folder)
        git = ('git', '-C', str(ROOT), 'worktree')
        subprocess.run([*git, 'add', '--detach', str(there), options.before], check=True)
        try:
            for name, (config, steps) in RUNS.items():
                flags = [f'--config.total_steps={steps}', f'--config.checkpoint_every={steps // 2}']
                flags += ['--config.log_every=5']
                before, after, resumed = (
                    out / f'{name}_{w}' for w in ('before', 'after', 'resumed')
                )
                train(there, before, config, *flags)
                train(ROOT, after, config, *flags)
                differ |= compare(name, before, after, options.ignore)
                shutil.copytree(before, resumed)
                shutil.rmtree(newest(resumed))
                train(ROOT, resumed, config, *flags)
                differ |= compare(f'{name}, resumed', before, resumed, options.ignore)
                train(ROOT, before, config, *flags, '--eval_only')
                first, *_, last = (r for r in metrics(before, options.ignore) if is_end(r))
                keys = [k for k in first if first[k] != last.get(k)]
                print(f'{name}, evaluated: {len(first)} numbers, {len(keys)} differ')
                differ |= bool(keys)
        finally:
            subprocess.run([*git, 'remove', '--force', str(there)], check=True)
    return int(differ)


if __name__ == '__main__':
    sys.exit(main())
