"""Optimisers against float64 NumPy written from the papers; the schedule; who is decayed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax import models, optim
from contrastive_jax.config import UserError
from contrastive_jax.models import resnet, vit

STEPS, BATCH = 10, 512
DECAYED = {'kernel', 'convolution'}
SHARED = {'learning_rate': 0.3, 'total_steps': STEPS, 'batch_size': BATCH, 'weight_decay': 0.2}


def tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        'kernel': (5, 4),
        'convolution': (3, 3, 2, 4),
        'bias': (4,),
        'cls_token': (1, 1, 4),
        'position_embedding': (1, 3, 4),
        'temperature': (),
    }
    return {k: rng.normal(size=v) for k, v in shapes.items()}


def rate(step: int, warmup: float = 0.2) -> float:
    """The schedule for SHARED, by its definition."""
    peak, rise = 0.3 * BATCH / 256, round(warmup * STEPS)
    if step < rise:
        return peak * step / rise
    return peak * 0.5 * (1 + np.cos(np.pi * (step - rise) / (STEPS - rise)))


def norm(x):
    return np.sqrt(np.sum(np.square(x)))


# Exact in binary: with 0.999 the bias correction, 1 - 0.999 in float32, is off by 3e-5 itself.
BETAS = {'b1': 0.875, 'b2': 0.9375}


def adam(memory, gradient, step, eps):
    b1, b2 = BETAS.values()
    m = memory['m'] = b1 * memory.get('m', 0.0) + (1 - b1) * gradient
    v = memory['v'] = b2 * memory.get('v', 0.0) + (1 - b2) * gradient**2
    return (m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + eps)


def adamw(name, p, g, step, memory):
    decay = 0.2 if name in DECAYED else 0.0
    return p - rate(step) * (adam(memory, g, step, 1e-8) + decay * p)


def sgd(name, p, g, step, memory):
    decay = 0.2 if name in DECAYED else 0.0
    memory['b'] = 0.9 * memory.get('b', 0.0) + g + decay * p
    return p - rate(step) * memory['b']


def lars(name, p, g, step, memory):
    local = 1.0
    if name in DECAYED:
        g = g + 0.2 * p
        local = 0.001 * norm(p) / norm(g)
    memory['v'] = 0.9 * memory.get('v', 0.0) + rate(step) * local * g
    return p - memory['v']


def lamb(name, p, g, step, memory):
    r = adam(memory, g, step, 1e-6)
    local = 1.0
    if name in DECAYED:
        r = r + 0.2 * p
        local = norm(p) / norm(r)
    return p - rate(step) * local * r


@pytest.mark.parametrize('clip', [0.0, 0.5])
@pytest.mark.parametrize('oracle', [adamw, sgd, lars, lamb])
def test_four_steps_match_the_paper(oracle, clip):
    options = BETAS if oracle in (adamw, lamb) else {}
    tx, _ = optim.make(name=oracle.__name__, warmup=0.2, clip_norm=clip, **SHARED, **options)
    want = tree(0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), want)
    state = tx.init(params)
    update = jax.jit(tx.update)
    memory = {k: {} for k in want}
    for step in range(4):
        gradients = tree(step + 1)
        updates, state = update(jax.tree.map(jnp.float32, gradients), state, params)
        params = optax.apply_updates(params, updates)
        total = norm([norm(g) for g in gradients.values()])
        scale = min(1.0, clip / total) if clip else 1.0
        for k in want:
            want[k] = oracle(k, want[k], gradients[k] * scale, step, memory[k])
        if step == 0:  # the first step of a warm-up moves nothing
            jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.float32, tree(0)))
    for k in want:
        np.testing.assert_allclose(params[k], want[k], rtol=2e-5, atol=2e-6, err_msg=k)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('adamw', {'b1': 0.5, 'b2': 0.95, 'eps': 0.1}),
        ('sgd', {'momentum': 0.5}),
        ('lars', {'momentum': 0.5, 'trust_coefficient': 0.02}),
        ('lamb', {'b1': 0.5, 'b2': 0.95, 'eps': 0.1}),
    ],
)
def test_options_reach_the_optimisers(name, options):
    params = {'kernel': jnp.asarray(tree(0)['kernel'], jnp.float32)}

    def second_update(**kwargs):
        tx, _ = optim.make(name=name, **SHARED, **kwargs)
        state = tx.init(params)
        for gradients in ({'kernel': jnp.full((5, 4), 1.0)}, {'kernel': jnp.full((5, 4), 3.0)}):
            out, state = tx.update(gradients, state, params)
        return out['kernel']

    plain = second_update()
    for key, value in options.items():
        assert float(jnp.abs(second_update(**{key: value}) - plain).max()) > 1e-4, key


def test_schedule():
    _, schedule = optim.make(name='sgd', learning_rate=0.1, total_steps=100, batch_size=1024,
                             warmup=0.1)  # fmt: skip
    wanted = {0: 0.0, 5: 0.2, 10: 0.4, 55: 0.2, 100: 0.0, 1000: 0.0}
    for step, want in wanted.items():
        np.testing.assert_allclose(schedule(step), want, atol=1e-7)
    np.testing.assert_allclose(schedule(99), 0.2 * (1 + np.cos(np.pi * 89 / 90)), rtol=1e-3)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(55)), 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ('warmup', 'final', 'wanted'),
    [
        (0.0, 0.0, [1.0, 0.5, 0.0]),  # no warm-up: the first step has the peak
        (1.0, 0.0, [0.0, 0.5, 1.0]),  # all warm-up
        (0.0, 0.001, [1.0, 0.5005, 0.001]),  # Barlow Twins' floor
    ],
)
def test_schedule_at_its_edges(warmup, final, wanted):
    schedule = optim.warmup_cosine(1.0, 8, warmup, final)
    np.testing.assert_allclose([schedule(s) for s in (0, 4, 8)], wanted, atol=1e-6)


def test_who_is_decayed():
    names = {k for k, v in optim.decayed(tree(0)).items() if v}
    assert names == DECAYED
    for module, shape in (
        (vit.make(width=16, depth=1, heads=2, patch=4, position='learned'), (1, 8, 8, 3)),
        (resnet.make(widths=(8,), blocks=(1,), stem='cifar'), (1, 8, 8, 3)),
    ):
        start = partial(models.init, module)
        params, _ = jax.eval_shape(start, jax.random.key(0), jnp.zeros(shape))
        for path, decays in jax.tree_util.tree_leaves_with_path(optim.decayed(params)):
            assert decays == (path[-1].key == 'kernel'), path


def test_lamb_moves_biases_that_start_at_zero():
    # With a trust ratio on them, a warm-up from 0 leaves them at about 1e-5 for ever.
    tx, _ = optim.make(name='lamb', learning_rate=0.01, total_steps=50, batch_size=256, warmup=0.1)
    params = {'bias': jnp.zeros(4)}
    state = tx.init(params)
    for _ in range(20):
        updates, state = tx.update({'bias': jnp.ones(4)}, state, params)
        params = optax.apply_updates(params, updates)
    assert float(params['bias'].max()) < -0.1


def test_state_follows_the_parameters_structure():
    """The trainer restores by structure and shape: an update must keep them, in float32."""
    for name in optim.OPTIMISERS:
        tx, _ = optim.make(name=name, clip_norm=1.0, **SHARED)
        params = jax.tree.map(jnp.float32, tree(0))
        before = jax.eval_shape(tx.init, params)
        after = jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p)[1], params)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(before)]
        assert shapes == [(x.shape, x.dtype) for x in jax.tree.leaves(after)]


@pytest.mark.parametrize(
    ('change', 'parts'),
    [
        ({'name': 'lasr'}, ["'lasr'", "Did you mean 'lars'", "'adamw', 'sgd', 'lars', 'lamb'"]),
        ({'learning_rate': -1.0}, ['config.optim.learning_rate', '-1.0', 'at least 0']),
        ({'learning_rate': float('nan')}, ['config.optim.learning_rate', 'nan']),
        ({'warmup': 10.0}, ['config.optim.warmup', '10.0', 'at most 1']),
        ({'final_fraction': 2.0}, ['config.optim.final_fraction']),
        ({'weight_decay': -0.1}, ['config.optim.weight_decay']),
        ({'clip_norm': -0.1}, ['config.optim.clip_norm']),
        ({'total_steps': 0}, ['config.total_steps', 'at least 1']),
        ({'momentun': 0.9}, ["'momentun'", "Did you mean 'momentum'"]),
        ({'warmpu': 0.1}, ["'warmpu'", "Did you mean 'warmup'"]),
        ({'b1': 0.9}, ["key for sgd 'b1'", "'momentum'"]),
        ({'momentum': 1.5}, ['momentum', '1.5']),
    ],
)
def test_errors_say_what_to_do(change, parts):
    with pytest.raises(UserError) as error:
        optim.make(**{'name': 'sgd', **SHARED, **change})
    for part in parts:
        assert part in str(error.value)
