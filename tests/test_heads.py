"""Heads: their layers, their BatchNorm, how DINO's starts, their errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.layers.heads import MLP, DINOHead


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


@pytest.mark.parametrize('learn_length', [False, True])
def test_dinos_last_layer_is_a_weight_norm(learn_length):
    """Float64 of torch's: `length · kernel / |kernel|` times the unit output of the MLP."""
    head = DINOHead(prototypes=6, hidden=7, bottleneck=4, learn_length=learn_length)
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(9, 5)))
    structure = jax.eval_shape(partial(models.init, head), jax.random.key(0), x)[0]
    assert sorted(structure['last']) == ['kernel', *['length'] * learn_length]
    params = jax.tree.map(lambda a: np.float32(rng.uniform(0.5, 1.5, a.shape)), structure)
    got, _ = models.apply(head, params, {}, x, True)
    p = jax.tree.map(np.float64, params)
    z = np.float64(x)
    for i in (1, 2, 3):
        z = z @ p['mlp'][f'linear{i}']['kernel'] + p['mlp'][f'linear{i}']['bias']
        if i < 3:
            z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    want = z @ p['last']['kernel']
    want /= np.linalg.norm(z, axis=1, keepdims=True) * np.linalg.norm(p['last']['kernel'], axis=0)
    if learn_length:
        assert params['last']['length'].shape == (1, 6)
        want *= p['last']['length']
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_dinos_head_starts_as_the_authors_do():
    head = DINOHead(prototypes=300, hidden=200, bottleneck=100, learn_length=True)
    params, _ = models.init(head, jax.random.key(0), jnp.zeros((2, 150)))
    for i in (1, 2, 3):
        linear = params['mlp'][f'linear{i}']
        assert not np.any(linear['bias'])
        np.testing.assert_allclose(np.std(linear['kernel']), 0.02, rtol=0.03)
        assert np.abs(linear['kernel']).max() > 0.06  # not cut off at two or three deviations
    kernel = params['last']['kernel']
    assert 0.099 < np.abs(kernel).max() <= 0.1  # torch's Linear: uniform within ±1/√100
    np.testing.assert_allclose(np.std(kernel), 0.1 / np.sqrt(3), rtol=0.03)
    assert np.all(params['last']['length'] == 1)


@pytest.mark.parametrize('key', ['hidden', 'out', 'layers'])
def test_errors_say_what_to_do(key):
    head = MLP(**{'hidden': 4, 'out': 4, 'layers': 2, key: 0})
    with pytest.raises(
        UserError, match=rf'head\.{key}: got 0; expected a whole number of at least 1'
    ):
        models.init(head, jax.random.key(0), jnp.zeros((2, 4)))
