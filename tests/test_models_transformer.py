"""The text transformer: its formula, what a token sees, padding, errors."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import config, models
from contrastive_jax.config import UserError
from contrastive_jax.models import transformer

TINY = {'vocabulary': 11, 'length': 6, 'width': 16, 'depth': 2, 'heads': 2}
IDS = np.array([[9, 3, 4, 10, -1, -1], [9, 1, 2, 0, 5, 10]], np.int32)
init = jax.jit(models.init, static_argnums=0)
apply = jax.jit(models.apply, static_argnums=(0, 4))


def drawn(module):
    """Parameters of the module's structure, all of them random."""
    rng = np.random.default_rng(1)
    like, _ = jax.eval_shape(partial(models.init, module), jax.random.key(0), jnp.asarray(IDS))
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) / 4), like)


def oracle(params, ids, causal, kept=slice(None)):
    """One text, token by token, in float64: only those that are there, and kept."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)

    def norm(at, v):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
        return v * at['scale'] + at['bias']

    def dense(at, v):
        return v @ at['kernel'] + at['bias']

    ids = ids[ids >= 0]
    x = (p['token_embedding'][ids] + p['position_embedding'][0, : len(ids)])[kept]
    for i in range(2):
        b = p[f'block{i}']
        q, k, v = np.split(dense(b['attention']['qkv'], norm(b['norm1'], x)), 3, axis=-1)
        mixed = np.zeros_like(x)
        for head in (slice(0, 8), slice(8, 16)):
            for t in range(len(x)):
                seen = slice(0, t + 1) if causal else slice(None)
                score = np.exp(k[seen, head] @ q[t, head] / np.sqrt(8))
                mixed[t, head] = score / score.sum() @ v[seen, head]
        x = x + dense(b['attention']['out'], mixed)
        y = dense(b['mlp1'], norm(b['norm2'], x))
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(b['mlp2'], y)
    return norm(p['norm'], x)


@pytest.mark.parametrize(
    ('causal', 'pool'), [(True, 'last'), (False, 'last'), (False, 'first'), (False, 'mean')]
)
def test_it_is_the_papers(causal, pool):
    module = transformer.make(**TINY, causal=causal, pool=pool)
    params = drawn(module)
    (features, named), _ = apply(module, params, {}, jnp.asarray(IDS), True)
    assert features.dtype == jnp.float32
    for row, ids in enumerate(IDS):
        want = oracle(params, ids, causal)
        np.testing.assert_allclose(named['tokens'][row, : len(want)], want, atol=1e-5)
        pooled = {'last': want[-1], 'first': want[0], 'mean': want.mean(0)}[pool]
        np.testing.assert_allclose(features[row], pooled, atol=1e-5)


@pytest.mark.parametrize(('causal', 'pool'), [(True, 'last'), (False, 'mean')])
def test_dropped_tokens_are_as_if_they_were_not_there(causal, pool):
    module = transformer.make(**TINY, causal=causal, pool=pool, drop_tokens=0.3)
    params = drawn(module)
    texts = jnp.asarray(np.tile(IDS[1], (512, 1)))
    (features, _), _ = apply(module, params, {}, texts, True, key=jax.random.key(3))
    inner = [np.array(kept, bool) for kept in itertools.product((0, 1), repeat=4)]
    want = []
    for kept in inner:
        tokens = oracle(params, IDS[1], causal, np.array([True, *kept, True]))
        want.append(tokens[-1] if pool == 'last' else tokens.mean(0))
    away = np.abs(np.asarray(features)[:, None] - np.stack(want)).max(axis=-1)
    assert away.min(axis=1).max() < 1e-5
    share = np.stack(inner)[away.argmin(axis=1)].mean(axis=0)
    np.testing.assert_allclose(share, 0.7, atol=0.08)  # 4 standard deviations

    # An evaluation, or no key: every token.
    whole = transformer.make(**TINY, causal=causal, pool=pool)
    (expected, _), _ = apply(whole, params, {}, texts[:2], True)
    for train, key in ((False, jax.random.key(3)), (True, None)):
        (features, _), _ = apply(module, params, {}, texts[:2], train, key=key)
        np.testing.assert_array_equal(features, expected)


def test_padding_changes_nothing_and_no_text_is_no_nan():
    module = transformer.make(**TINY, causal=False)
    params = drawn(module)
    (short, _), _ = apply(module, params, {}, jnp.asarray(IDS[:1, :4]), False)
    (padded, _), _ = apply(module, params, {}, jnp.asarray(IDS[:1]), False)
    np.testing.assert_allclose(short, padded, atol=1e-6)
    nothing = jnp.full((1, 6), -1)
    (features, _), _ = apply(module, params, {}, nothing, False)
    assert np.isfinite(features).all()


def test_remat_changes_no_gradient():
    plain = transformer.make(**TINY)
    params = drawn(plain)

    def value(module, params):
        (features, _), _ = models.apply(module, params, {}, jnp.asarray(IDS), True)
        return jnp.sum(jnp.sin(features))

    both = [
        jax.jit(jax.grad(partial(value, m)))(params)
        for m in (plain, transformer.make(**TINY, remat=True))
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert np.abs(a).max() > 0


def test_what_an_encoder_is_given_is_what_it_starts_from():
    module = transformer.make(**TINY)
    params = drawn(module)
    given = models.Pretrained(module, params, {}, 'runs/other')
    found, stats = models.init(given, jax.random.key(0), jnp.asarray(IDS))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert stats == {}
    (want, _), _ = models.apply(module, params, {}, jnp.asarray(IDS), False)
    (got, _), _ = models.apply(given, params, {}, jnp.asarray(IDS), False)
    np.testing.assert_array_equal(got, want)
    other = models.Pretrained(transformer.make(**TINY | {'width': 8}), params, {}, 'runs/other')
    with pytest.raises(UserError, match=r'(?s)runs/other.*differ.*here \(.*there \('):
        models.init(other, jax.random.key(0), jnp.asarray(IDS))


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        ({'width': 15}, ['heads must divide width']),
        ({'depth': 0}, ['config.text.depth', 'got 0']),
        ({'pool': 'max'}, ["'max'", "'last'", "'first'", "'mean'"]),
        ({'pool': 'first'}, ['causal']),
        ({'drop_tokens': 1.0}, ['config.text.drop_tokens', '1.0', 'below 1']),
        ({'dtype': 'float16'}, ["'float16'", "'bfloat16'"]),
    ],
)
def test_errors_say_what_to_do(options, parts):
    with pytest.raises(UserError) as error:
        config.build('models', {'name': 'transformer', **TINY, **options}, 'config.text')
    assert all(part in str(error.value) for part in parts), error.value


def test_a_longer_text_is_refused():
    with pytest.raises(UserError, match='got texts of 6 tokens; expected at most 5'):
        init(transformer.make(**TINY | {'length': 5}), jax.random.key(0), jnp.asarray(IDS))
