"""Checkpoints with Orbax, atomic and asynchronous, and the config that lies beside them.

A checkpoint is the whole TrainState and the data iterator's position, so that a continued run is
the same run. It appears under its final name only when it is complete.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from contrastive_jax.config import (
    ROLES,
    UserError,
    check_range,
    completed,
    defaults,
    flatten,
    updated,
)
from contrastive_jax.state import TrainState

CONFIG = 'config.json'


class Checkpoints:
    """The checkpoints of a workdir.

    Args:
        workdir: kept under `workdir/checkpoints/<step>`; a path or a bucket's URL.
        keep: how many of the newest stay; the one with the best metric stays beside them.
        best: the metric that says which is best (higher is better).
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, best: str):
        check_range('config', {'keep': keep}, least=1, whole=True)
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            epath.Path(workdir).absolute() / 'checkpoints',
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=lambda metrics: metrics[best],
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )
        self._best = best

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        iterator: grain.DatasetIterator | None,
        step: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save and returns once the state is copied; a step is saved once."""
        if self.latest == step:
            return
        metrics = {self._best: metrics[self._best]} if metrics and self._best in metrics else None
        items: dict[str, Any] = {'state': ocp.args.StandardSave(state._asdict())}
        if iterator is not None:
            items['data'] = grain.checkpoint.CheckpointSave(iterator)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(
        self, like: TrainState, iterator: grain.DatasetIterator | None = None
    ) -> TrainState | None:
        """The newest state, or None where there is none; sets the iterator to where it was.

        Args:
            like: shapes, dtypes and shardings of the state (`jax.eval_shape` with shardings).
            iterator: left alone if None.
        """
        if self.latest is None:
            return None
        items: dict[str, Any] = {'state': ocp.args.StandardRestore(like._asdict())}
        if iterator is not None:
            items['data'] = grain.checkpoint.CheckpointRestore(iterator)
        restored = self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        return TrainState(**restored['state'])

    def wait(self) -> None:
        """Returns when what is being saved is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends Orbax' threads."""
        self.wait()
        self._manager.close()


def newest(workdir: str | os.PathLike) -> int:
    """Step of the newest complete checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    step = latest(workdir)
    if step is None:
        raise UserError(f'there is no complete checkpoint in {workdir}/checkpoints.')
    return step


def latest(workdir: str | os.PathLike) -> int | None:
    """Step of the newest complete checkpoint of a workdir, which may not exist."""
    folder = epath.Path(workdir).absolute() / 'checkpoints'
    if not folder.exists():
        return None
    steps = ocp.path.step.standard_name_format().find_all(folder)
    return max((found.step for found in steps), default=None)


def weights(workdir: str | os.PathLike, step: int) -> tuple[Any, Any]:
    """`(params, extra)` of a complete checkpoint, as NumPy arrays, whatever devices wrote them."""
    path = epath.Path(workdir).absolute() / 'checkpoints' / str(step) / 'state'
    handler = ocp.PyTreeCheckpointHandler()
    found: Any = handler.metadata(path)
    like = {
        name: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found.tree[name])
        for name in ('params', 'extra')
    }
    restored = handler.restore(
        path,
        args=ocp.args.PyTreeRestore(
            item=like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=True,
        ),
    )
    handler.close()
    return restored['params'], restored['extra']


def check(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    must_exist: bool = False,
    free: Sequence[str] = (),
) -> None:
    """Refuses a workdir that belongs to another config.

    Args:
        workdir: its `config.json`, if there is one, says whose it is.
        config: JSON-serialisable; keys whose role is 'free' may differ.
        must_exist: refuse a workdir without a run, too.
        free: further keys that may differ: 'data.root'.

    Raises:
        UserError: the workdir's config differs; the keys are listed with both values.
    """
    if not must_exist and not exists(workdir):
        return
    # Keys that a run is older than had the effect of their defaults.
    theirs, ours = (
        defaults() | flatten(json.loads(json.dumps(completed(c)))) for c in (read(workdir), config)
    )
    differing = [
        f'  config.{key}: there {theirs.get(key, "(not set)")!r}, '
        f'here {ours.get(key, "(not set)")!r}'
        for key in sorted(ours.keys() | theirs.keys())
        if key.split('.')[0] not in ROLES['free']
        and key not in free
        and ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise UserError(
            f'{workdir} belongs to a run with another config:\n'
            + '\n'.join(differing)
            + '\nUse another --workdir, or the config that it was started with.'
        )


def exists(workdir: str | os.PathLike) -> bool:
    """Whether the workdir is a run's."""
    return (epath.Path(workdir) / CONFIG).exists()


def read(workdir: str | os.PathLike) -> dict[str, Any]:
    """The config that a workdir's run was started with, in today's keys; raises as `written`."""
    return updated(written(workdir))


def written(workdir: str | os.PathLike) -> dict[str, Any]:
    """The content of a workdir's config.json, by whichever version.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise UserError(f'--workdir: there is no run in {workdir} (no {CONFIG}).')
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f'{path}: not JSON ({error}); is this a workdir of ours?') from error


def claim(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes the config into the workdir, which is created if missing."""
    path = epath.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        temporary = path / f'{CONFIG}.tmp'
        temporary.write_text(json.dumps(dict(config), indent=2) + '\n')
        temporary.replace(path / CONFIG)
