"""The projection head: its layers, its BatchNorm, its errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.layers.heads import MLP


def test_batch_statistics():
    module = MLP(hidden=4, out=3, layers=2)
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(2.0, 1.0, (32, 5)))
    structure = jax.eval_shape(partial(models.init, module), jax.random.key(0), x)
    params, stats = jax.tree.map(lambda a: np.float32(rng.uniform(0.5, 1.5, a.shape)), structure)
    train, new = models.apply(module, params, stats, x, True)

    p, old = jax.tree.map(np.float64, (params, stats))
    z = np.float64(x) @ p['linear1']['kernel']
    running = {'mean': z.mean(0), 'var': z.var(0)}
    for k, v in running.items():
        np.testing.assert_allclose(new['norm1'][k], 0.9 * old['norm1'][k] + 0.1 * v, rtol=1e-4)

    def rest(mean, var):
        y = (z - mean) / np.sqrt(var + 1e-5) * p['norm1']['scale'] + p['norm1']['bias']
        return np.maximum(y, 0) @ p['linear2']['kernel'] + p['linear2']['bias']

    np.testing.assert_allclose(train, rest(**running), rtol=1e-4, atol=1e-5)
    evaluated, same = models.apply(module, params, new, x, False)
    jax.tree.map(np.testing.assert_array_equal, same, new)
    want = rest(**jax.tree.map(np.float64, new['norm1']))
    np.testing.assert_allclose(evaluated, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('options', 'wanted'),
    [
        ({}, {'linear1': ['kernel'], 'norm1': ['bias', 'scale'], 'linear2': ['bias', 'kernel']}),
        ({'batch_norm': False}, {'linear1': ['bias', 'kernel'], 'linear2': ['bias', 'kernel']}),
        (
            {'layers': 3, 'last_batch_norm': True},
            {
                'linear1': ['kernel'],
                'norm1': ['bias', 'scale'],
                'linear2': ['kernel'],
                'norm2': ['bias', 'scale'],
                'linear3': ['kernel'],
                'norm3': ['scale'],
            },
        ),
    ],
)
def test_head_layers(options, wanted):
    head = MLP(hidden=7, out=3, **options)
    x = jnp.zeros((4, 5))
    params, stats = jax.eval_shape(partial(models.init, head), jax.random.key(0), x)
    assert {k: sorted(v) for k, v in params.items()} == wanted
    assert params['linear1']['kernel'].shape == (5, 7)
    assert params[f'linear{head.layers}']['kernel'].shape[-1] == 3
    y, _ = jax.eval_shape(partial(models.apply, head, train=True), params, stats, x)
    assert (y.shape, y.dtype) == ((4, 3), jnp.float32)


def test_features_of_half_precision_give_float32():
    head = MLP(hidden=7, out=3)
    x = jnp.zeros((4, 5), jnp.bfloat16)
    params, stats = jax.eval_shape(partial(models.init, head), jax.random.key(0), x)
    y, _ = jax.eval_shape(partial(models.apply, head, train=True), params, stats, x)
    assert y.dtype == jnp.float32


@pytest.mark.parametrize('key', ['hidden', 'out', 'layers'])
def test_errors_say_what_to_do(key):
    head = MLP(**{'hidden': 4, 'out': 4, 'layers': 2, key: 0})
    with pytest.raises(
        UserError, match=rf'head\.{key}: got 0; expected a whole number of at least 1'
    ):
        models.init(head, jax.random.key(0), jnp.zeros((2, 4)))
