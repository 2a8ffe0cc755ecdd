"""The workdir's environment.json: machine, packages and commits of every start, data in numbers."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from contrastive_jax.data import Source

FILE = 'environment.json'
PACKAGES = (
    'contrastive-jax',
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
    'numpy',
)


def record(workdir: str, splits: Mapping[str, Source]) -> None:
    """Adds this start to the file, and says what the data is. Only the first process writes.

    {"data": {"splits": {name: records}, "classes": {label: [...]}}, "starts": [{"time", "command",
    "python", "system", "packages", "devices", "processes", "git"}, ...]}; 'git' is the commit of
    the directory that the program was started in, with 'changed' where tracked files differ.
    """
    if jax.process_index() != 0:
        return
    kinds = [device.device_kind for device in jax.devices()]
    start = {
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]],
        'python': platform.python_version(),
        'system': platform.platform(),
        'packages': {name: version for name in PACKAGES if (version := _version(name))},
        'devices': {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        'processes': jax.process_count(),
        'git': _git(),
    }
    data = {
        'splits': {name: len(source) for name, source in splits.items()},
        'classes': splits['train'].classes,
    }
    found = {'data': data, 'starts': [*read(workdir).get('starts', ()), start]}
    path = epath.Path(workdir) / FILE
    temporary = path.with_name(f'{FILE}.tmp')
    temporary.write_text(json.dumps(found, indent=1) + '\n')
    temporary.replace(path)


def read(workdir: str | os.PathLike) -> dict[str, Any]:
    """Reads what `record` has written; {} where it has not, or where it is no JSON."""
    path = epath.Path(workdir) / FILE
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        return {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> str | None:
    def ask(*words: str) -> str:
        command = subprocess.run(['git', *words], capture_output=True, text=True, timeout=20)
        command.check_returncode()
        return command.stdout.strip()

    try:
        changed = ', changed' if ask('status', '--porcelain', '--untracked-files=no') else ''
        return ask('rev-parse', 'HEAD') + changed
    except (OSError, subprocess.SubprocessError):
        return None
