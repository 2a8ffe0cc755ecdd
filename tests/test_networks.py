"""What methods remember between steps: target networks and queues."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import models
from contrastive_jax.layers.heads import MLP
from contrastive_jax.models import resnet, vit
from contrastive_jax.networks.chain import Chain, join_crops
from contrastive_jax.networks.memory import enqueue, random_queue
from contrastive_jax.networks.target import Target, momentum_to_one, ramp


@pytest.mark.parametrize(('b', 'k'), [(2, 5), (5, 5), (7, 5)])
def test_a_queue_keeps_the_newest_in_order(b, k):
    queue, items = np.arange(k, dtype=np.float32), 100 + np.arange(b)
    got = enqueue(jnp.asarray(queue), jnp.asarray(items))
    np.testing.assert_array_equal(got, [*queue, *items][-k:])
    assert got.dtype == jnp.float32


def test_a_queue_starts_with_unit_vectors():
    queue = random_queue(jax.random.key(0), 6, 2, 8)
    np.testing.assert_allclose(np.linalg.norm(queue, axis=-1), np.ones((6, 2)), rtol=1e-6)


def two_views():
    """[8, 2, 8, 8, 3], the second with other moments, as where augmentation is asymmetric."""
    x = np.random.default_rng(0).normal(size=(8, 2, 8, 8, 3))
    x[:, 1] = 3 * x[:, 1] + 1
    return jnp.float32(x)


@pytest.mark.parametrize('parts', [1, 2])
def test_batch_norm_sees_each_view_by_itself(parts):
    """As one call for each view in their order does; the averages go from one to the next."""
    small = resnet.make(stem='patch4', widths=(8,), blocks=(1,), zero_init_last=False)
    encoder = models.Microbatched(small, parts)
    heads = {'projector': MLP(8, 4, last_bias=False)}
    chain, views = Chain(encoder, apart=True, **heads), two_views()
    params, stats = chain.init(jax.random.key(0), views[:, 0])
    outputs, after = chain.views(params, stats, views)
    wanted = stats
    for v in range(2):
        alone, wanted = chain(params, wanted, views[:, v])
        for name in ('encoder', 'projector'):
            np.testing.assert_allclose(outputs[name][:, v], alone[name], 1e-5, 1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), after, wanted)

    together, _ = Chain(encoder, **heads).views(params, stats, views)
    assert not np.allclose(together['projector'], outputs['projector'], atol=0.1)
    for train in (True, False):
        one = [
            c.views(params, stats, views[:, :1], train=train)[0] for c in (chain, Chain(encoder))
        ]
        np.testing.assert_array_equal(one[0]['encoder'], one[1]['encoder'])


def test_what_has_no_batch_norm_is_called_once_for_all_views(monkeypatch):
    rows = []
    apply = models.apply

    def counted(module, params, stats, x, *args, **options):
        rows.append(len(x))
        return apply(module, params, stats, x, *args, **options)

    encoder = vit.make(width=16, depth=1, heads=2, patch=4)
    chain, views = Chain(encoder, apart=True, projector=MLP(8, 4)), two_views()
    params, stats = chain.init(jax.random.key(0), views[:, 0])
    monkeypatch.setattr(models, 'apply', counted)
    chain.views(params, stats, views)
    assert rows == [16, 8, 8]
    rows.clear()
    chain.views(params, stats, views, train=False)
    assert rows == [16, 16]


class Noisy(nn.Module):
    """BatchNorm of an image's mean, and noise that is drawn as stochastic depth is."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x.mean((1, 2)))
        noise = jax.random.normal(self.make_rng('drop'), x.shape) if train else 0.0
        return x + noise, {}


def test_each_view_draws_for_itself():
    chain, view = Chain(Noisy(), apart=True), two_views()[:, :1]
    params, stats = chain.init(jax.random.key(0), view[:, 0])
    same = jnp.concatenate([view, view], axis=1)
    out, _ = chain.views(params, stats, same, key=jax.random.key(1))
    assert not np.allclose(out['encoder'][:, 0], out['encoder'][:, 1], atol=0.1)


def test_schedules():
    momentum = momentum_to_one(0.9)
    for progress, want in ((0, 0.9), (0.25, 1 - 0.05 * (1 + np.sqrt(0.5))), (0.5, 0.95), (1, 1)):
        np.testing.assert_allclose(momentum(jnp.float32(progress)), want, rtol=1e-6)
    for progress, want in ((0, 0.04), (0.1, 0.055), (0.2, 0.07), (0.9, 0.07)):
        np.testing.assert_allclose(ramp(jnp.float32(progress), 0.04, 0.07, 0.2), want, rtol=1e-6)
    assert ramp(jnp.float32(0), 0.04, 0.07, 0.0) == jnp.float32(0.07)


@pytest.mark.parametrize('norm', ['batch', 'running'])
def test_a_target_follows_its_modules(norm):
    """Float64 of θ' ← m θ' + (1 − m) θ; and whose statistics BatchNorm takes."""
    encoder = vit.make(width=16, depth=1, heads=2, patch=4)
    chain = Chain(encoder, projector=MLP(8, 4, last_bias=False), predictor=MLP(8, 4))
    modules = ('encoder', 'projector')
    target = Target(chain, modules, lambda progress: 0.5 + progress, norm)
    views = jax.random.normal(jax.random.key(1), (6, 2, 8, 8, 3))
    params, extra = target.init(jax.random.key(0), {'views': views}, 10)
    assert set(extra['target']['params']) == set(modules)

    outputs, state = target.views(extra['target'], views)
    assert set(outputs) == {*modules, 'named'}
    assert outputs['projector'].shape == (6, 2, 4)
    want, stats = chain.views(params, extra['stats'], views, train=norm == 'batch')
    np.testing.assert_array_equal(outputs['projector'], want['projector'])
    apart, _ = target.views(extra['target'], views[:3])
    alone = np.allclose(apart['projector'], outputs['projector'][:3], atol=1e-4)
    assert alone == (norm == 'running')

    online = {k: jax.tree.map(lambda x: x + 1.0, params[k]) for k in params}
    extra = {'stats': jax.tree.map(lambda x: x + 1.0, stats), 'target': state}
    moved = target.follow(online, extra, None, jnp.float32(0.25))['target']

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)

    def follow(old, new):
        return 0.75 * np.float64(old) + 0.25 * np.float64(new)

    for tree, ours, theirs, follows in (
        ('params', state['params'], online, True),
        ('stats', state['stats'], extra['stats'], norm == 'running'),
    ):
        theirs = {k: theirs[k] for k in modules}
        wanted = jax.tree.map(follow, ours, theirs) if follows else ours
        jax.tree.map(close, moved[tree], wanted)


def test_a_target_has_no_gradient():
    encoder = vit.make(width=16, depth=1, heads=2, patch=4)
    target = Target(Chain(encoder), ('encoder',), 0.9)
    views = jnp.ones((2, 2, 8, 8, 3))
    params, stats = models.init(encoder, jax.random.key(0), views[:, 0])
    state = target.copy({'encoder': params}, {'encoder': stats})

    def total(state):
        return target.views(state, views)[0]['encoder'].sum()

    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(total)(state)))


def test_crops_meet_in_the_heads_batch_norm_and_not_in_the_encoders():
    """Float64 of the head on all crops at once; the encoder's averages move once for each size."""
    encoder = resnet.make(stem='patch4', widths=(8,), blocks=(1,))
    chain = Chain(encoder, projector=MLP(6, 4))
    rng = np.random.default_rng(0)
    batch = {
        'views': np.float32(rng.normal(size=(5, 2, 8, 8, 3))),
        'local_views': np.float32(rng.normal(1.0, 2.0, size=(5, 3, 4, 4, 3))),
    }
    params, stats = chain.init(jax.random.key(0), jnp.asarray(batch['views'][:, 0]))
    run = jax.jit(lambda b: join_crops('test', chain, params, stats, b, jax.random.key(1)))
    out, new = run(batch)
    moved, features = stats['encoder'], []
    for crops in batch.values():
        flat = jnp.asarray(crops.reshape(-1, *crops.shape[2:]))
        (x, _), moved = models.apply(encoder, params['encoder'], moved, flat, True)
        features.append(np.reshape(x, (5, -1, 8)))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, new['encoder'], moved)
    x = np.float64(np.concatenate(features, axis=1))
    close(out['encoder'], x)
    assert all(len(x[0]) == 2 for x in out['named'].values())

    p = jax.tree.map(np.float64, params['projector'])
    z = x @ p['linear1']['kernel']
    mean, var = z.mean((0, 1)), z.var((0, 1))
    close(new['projector']['norm1']['mean'], 0.1 * mean)
    y = (z - mean) / np.sqrt(var + 1e-5) * p['norm1']['scale'] + p['norm1']['bias']
    close(out['projector'], np.maximum(y, 0) @ p['linear2']['kernel'] + p['linear2']['bias'])
