"""Whether a change of the code changes what it computes: two runs before and after, bit for bit.

    python benchmarks/same_bits.py --before=f7537c3

SimCLR on digits (60 steps) and CLIP on grids of digits (30 steps) are trained by the code of the
commit `before`, in a work tree of its own, and by the code around this file. All numbers of their
metrics.jsonl, speeds aside, and all bits of their newest checkpoints must be equal; the exit code
is 1 where one is not. `--ignore=eval/linear/` passes over metrics that are meant to change.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RUNS = {
    'simclr': ('configs/simclr_vit.py', '--config.total_steps=60', '--config.log_every=5'),
    'clip': ('configs/clip_vit.py', '--config.total_steps=30', '--config.log_every=5'),
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

    newest = max((workdir / 'checkpoints').glob('[0-9]*'), key=lambda p: int(p.name))
    path = epath.Path(newest) / 'state'
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
    how = ocp.checkpoint_utils.construct_restore_args(like)
    found = handler.restore(path, args=ocp.args.PyTreeRestore(item=like, restore_args=how))
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {
        jax.tree_util.keystr(k): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for k, x in leaves
    }


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
            for name, (config, *flags) in RUNS.items():
                workdirs = [out / f'{name}_before', out / f'{name}_after']
                for code, workdir in zip((there, ROOT), workdirs, strict=True):
                    train(code, workdir, config, *flags)
                values = [metrics(w, options.ignore) for w in workdirs]
                keys = [
                    f'step {a["step"]}, {k}: before {a.get(k)}, after {b.get(k)}'
                    for a, b in zip(*values, strict=True)
                    for k in a.keys() | b.keys()
                    if a.get(k) != b.get(k)
                ]
                bits = [arrays(w) for w in workdirs]
                names = [
                    k for k in bits[0].keys() | bits[1].keys() if bits[0].get(k) != bits[1].get(k)
                ]
                differ |= bool(keys or names)
                count = sum(map(len, values[0]))
                print(
                    f'{name}: {len(values[0])} records, {count} numbers, {len(keys)} differ; '
                    f'{len(bits[0])} arrays, {len(names)} differ'
                )
                for line in [*sorted(keys), *sorted(names)][:20]:
                    print(f'  {line}')
        finally:
            subprocess.run([*git, 'remove', '--force', str(there)], check=True)
    return int(differ)


if __name__ == '__main__':
    sys.exit(main())
