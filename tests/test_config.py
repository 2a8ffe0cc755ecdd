"""Ranges of numbers in a config, and when two configs are the same."""

import math
import pathlib
import runpy

import numpy as np
import pytest

from contrastive_jax.config import UserError, check_range
from contrastive_jax.workdir import checkpoint


@pytest.mark.parametrize(
    ('value', 'bounds', 'expected'),
    [
        (0, {'above': 0}, 'a number above 0'),
        (-0.5, {'least': 0}, 'a number of at least 0'),
        (1.5, {'least': 0, 'most': 1}, 'a number from 0 to 1'),
        (1, {'least': 0, 'below': 1}, 'a number of at least 0 and below 1'),
        (0.0, {'above': 0, 'most': 1}, 'a number above 0 and of at most 1'),
        (3, {'most': 2, 'whole': True}, 'a whole number of at most 2'),
        (1.0, {'least': 1, 'whole': True}, 'a whole number of at least 1'),
        (math.nan, {'least': 0}, 'a number of at least 0'),
        (math.inf, {'above': 0}, 'a number above 0'),
        (-math.inf, {}, 'a number'),
        (True, {'least': 0}, 'a number of at least 0'),
        ('1', {'least': 0}, 'a number of at least 0'),
        ((1, 2), {'least': 0}, 'a number of at least 0'),
        (None, {}, 'a number'),
    ],
)
def test_what_is_out_of_range_is_named(value, bounds, expected):
    with pytest.raises(UserError) as error:
        check_range('config.evals.knn', {'k': value}, **bounds)
    assert str(error.value) == f'config.evals.knn.k: got {value!r}; expected {expected}.'
    with pytest.raises(UserError) as error:
        check_range('config.method', {'k': value}, who='moco', **bounds)
    assert str(error.value) == f'config.method.k: got {value!r}; moco expects {expected}.'


def test_what_is_in_range_passes():
    check_range('config', {'a': 0, 'b': 1, 'c': 0.5, 'd': np.float32(0.25)}, least=0, most=1)
    check_range('config', {'a': 1e-9, 'b': np.float64(1e300)}, above=0)
    check_range('config', {'a': 2**70, 'b': np.int32(1)}, least=1, whole=True)
    check_range('config', {'a': -1e300})


def test_a_key_at_its_default_is_no_other_config(tmp_path):
    """A run of before the key was there is the same run; with another value it is not."""
    path = pathlib.Path(__file__).parents[1] / 'configs' / 'clip_vit.py'
    config = runpy.run_path(str(path))['get_config']().to_dict()
    assert config['method'].pop('same_text') == 'negative'
    checkpoint.claim(tmp_path, config)
    for key in ('decayed', 'clip_by'):
        assert key not in config['optim']
    config['optim']['decayed'] = ('kernels', 'embeddings')
    for same in ({}, {'same_text': 'negative'}):
        checkpoint.check(tmp_path, {**config, 'method': {**config['method'], **same}})
    other = {**config, 'method': {**config['method'], 'same_text': 'mask'}}
    with pytest.raises(UserError, match="same_text: there 'negative', here 'mask'"):
        checkpoint.check(tmp_path, other)
