"""Whose workdir it is: the config of its run, and which other configs may look at it."""

import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from contrastive_jax import config as config_lib
from contrastive_jax.config import ROLES, Config, UserError
from contrastive_jax.workdir import checkpoint


def config_of(workdir: Any) -> Config:
    """That of a run, with the keys that it is older than at their defaults.

    Raises:
        UserError: there is no run in workdir.
    """
    config = config_lib.base()
    with config.unlocked():
        config.update(checkpoint.read(workdir))
    return config


def resolve(config: Config, workdir: str, eval_only: bool) -> Config:
    """A config as it is; or in the place of one that names no method, the config of a run.

    Args:
        config: as in `train.run`, or one of evaluators alone: `evals`, and maybe other data. One
            that names inputs but no method is of the baseline, which needs no run: its workdir is
            one without.
        workdir: of the run, whose method, model and inputs stay what they are.
        eval_only: whether nothing is trained.

    Raises:
        UserError: no run in workdir; evaluators alone, and something to train; a key that is the
            run's and set here.
    """
    if config.method:
        return config
    if not eval_only:
        raise UserError(
            'config.method: not set. A config of evaluators alone looks at what is trained: '
            '--eval_only --workdir=RUN.'
        )
    if config.inputs.get('name') and not checkpoint.exists(workdir):
        return config
    found, default = config_of(workdir), config_lib.base()
    flat = [config_lib.flatten(c.to_dict()) for c in (config, default)]
    for key, value in flat[0].items():
        if value != flat[1].get(key) and key not in ROLES['data'] and not key.startswith('evals.'):
            raise UserError(
                f'config.{key}: got {value!r}, but this is for the run in {workdir} to say; '
                f'expected evals, or one of {", ".join(ROLES["data"])}.'
            )
    keys = [key.removeprefix('data.') for key in ROLES['data']]
    given = {k: config.data[k] for k in keys if config.data[k] != default.data[k]}
    if 'source' in given:
        given = {'root': '', 'captions': '', **given}
    with found.unlocked():
        found.data.update(given)
        found.evals = config.evals
    return found


def other_data(config: Config, workdir: str) -> str:
    """'on_<source>_<root>' where config's data is not that of the run in workdir, else ''."""
    theirs: Mapping[str, Any] = config_of(workdir).data
    if all(config.data[k] == theirs[k] for k in ('source', 'root', 'captions', 'holdout')):
        return ''
    parts = config.data.source, epath.Path(config.data.root).name, config.data.captions
    return '_'.join(['on', *(re.sub(r'\W+', '_', p).strip('_') for p in parts if p)])
