"""Optimisers against float64 NumPy written from the papers; schedules; kinds of parameters."""

import pkgutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax import models, optim, parameters, schedules
from contrastive_jax.config import UserError
from contrastive_jax.models import dcgan, lab, nin, resnet, transformer, vit
from contrastive_jax.state import TrainState
from contrastive_jax.workdir import checkpoint

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


def decay(name: str, step: int, final: float | None) -> float:
    """Weight decay of a parameter: 0.2, or from there to `final` by a cosine (DINO)."""
    if name not in DECAYED:
        return 0.0
    if final is None:
        return 0.2
    return final + 0.5 * (0.2 - final) * (1 + np.cos(np.pi * step / STEPS))


def norm(x):
    return np.sqrt(np.sum(np.square(x)))


# Exact in binary: with 0.999 the bias correction, 1 - 0.999 in float32, is off by 3e-5 itself.
BETAS = {'b1': 0.875, 'b2': 0.9375}


def adam(memory, gradient, step, eps):
    b1, b2 = BETAS.values()
    m = memory['m'] = b1 * memory.get('m', 0.0) + (1 - b1) * gradient
    v = memory['v'] = b2 * memory.get('v', 0.0) + (1 - b2) * gradient**2
    return (m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + eps)


def adamw(name, p, g, step, memory, final):
    return p - rate(step) * (adam(memory, g, step, 1e-8) + decay(name, step, final) * p)


def sgd(name, p, g, step, memory, final):
    memory['b'] = 0.9 * memory.get('b', 0.0) + g + decay(name, step, final) * p
    return p - rate(step) * memory['b']


def lars(name, p, g, step, memory, final):
    local = 1.0
    if name in DECAYED:
        g = g + decay(name, step, final) * p
        local = 0.001 * norm(p) / norm(g)
    memory['v'] = 0.9 * memory.get('v', 0.0) + rate(step) * local * g
    return p - memory['v']


def lamb(name, p, g, step, memory, final):
    r = adam(memory, g, step, 1e-6)
    local = 1.0
    if name in DECAYED:
        r = r + decay(name, step, final) * p
        local = norm(p) / norm(r)
    return p - rate(step) * local * r


@pytest.mark.parametrize(('clip', 'final'), [(0.0, None), (0.5, None), (0.0, 0.8), (0.0, 0.0)])
@pytest.mark.parametrize('oracle', [adamw, sgd, lars, lamb])
def test_four_steps_match_the_paper(oracle, clip, final):
    options = BETAS if oracle in (adamw, lamb) else {}
    tx, _ = optim.make(name=oracle.__name__, warmup=0.2, clip_norm=clip, final_weight_decay=final,
                       **SHARED, **options)  # fmt: skip
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
            want[k] = oracle(k, want[k], gradients[k] * scale, step, memory[k], final)
        if step == 0:  # the first step of a warm-up moves nothing
            jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.float32, tree(0)))
    for k in want:
        np.testing.assert_allclose(params[k], want[k], rtol=2e-5, atol=2e-6, err_msg=k)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('adamw', {'b1': 0.5, 'b2': 0.95, 'eps': 0.1}),
        ('sgd', {'momentum': 0.5, 'nesterov': True}),
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
    schedule = schedules.warmup_cosine(1.0, 8, warmup, final)
    np.testing.assert_allclose([schedule(s) for s in (0, 4, 8)], wanted, atol=1e-6)


def test_a_warm_up_that_does_not_begin_at_zero():
    """SwAV's rises from 0.3 to 4.8."""
    schedule = schedules.warmup_cosine(4.8, 8, warmup=0.5, initial_fraction=1 / 16)
    np.testing.assert_allclose([schedule(s) for s in (0, 2, 4, 8)], [0.3, 2.55, 4.8, 0], atol=1e-6)


def test_steps_in_the_place_of_the_cosine():
    """Goyal et al. 2017: from 0.1 to 3.2 in 5 of 90 epochs, a tenth after 30, 60 and 80."""
    _, schedule = optim.make(
        name='sgd',
        learning_rate=0.1,
        batch_size=8192,
        total_steps=900,
        warmup=5 / 90,
        initial_fraction=0.1 / 3.2,
        milestones=(30 / 90, 60 / 90, 80 / 90),
    )
    wanted = {0: 0.1, 25: 1.65, 50: 3.2, 299: 3.2, 300: 0.32, 599: 0.32, 600: 0.032, 799: 0.032}
    wanted |= {800: 0.0032, 899: 0.0032, 2000: 0.0032}
    for step, want in wanted.items():
        np.testing.assert_allclose(schedule(step), want, rtol=1e-5)
    steps = jnp.arange(901)
    each = [schedule(step) for step in (0, 300, 900)]
    np.testing.assert_allclose(jax.jit(schedule)(steps)[jnp.array([0, 300, 900])], each, 1e-6)


def test_scaling_by_the_batch():
    for scaling, want in (('linear', 0.1 * 4096 / 256), ('sqrt', 0.1 * 2)):
        _, schedule = optim.make(
            name='sgd', learning_rate=0.1, total_steps=10, batch_size=4096, scaling=scaling
        )
        np.testing.assert_allclose(schedule(0), want, rtol=1e-6)


def test_weight_decays_schedule():
    schedule = schedules.cosine_between(0.04, 0.4, 100)
    for step, want in ((0, 0.04), (50, 0.22), (100, 0.4), (1000, 0.4)):
        np.testing.assert_allclose(schedule(step), want, rtol=1e-6)
    want = 0.4 - 0.36 * (1 + np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(25)), want, rtol=1e-5)


def shapes_of(module, *shape: int, **inputs):
    start = partial(models.init, module)
    return jax.eval_shape(start, jax.random.key(0), jnp.zeros(shape), **inputs)[0]


def test_layer_factors_of_a_vit_and_a_resnet():
    small = vit.make(
        width=16, depth=11, heads=2, patch=4, position='learned', layer_scale=0.1, remat=True
    )
    encoder = shapes_of(small, 1, 8, 8, 3, mask=jnp.zeros((1, 4), bool))
    params = {
        'encoder': encoder,
        'head': {'linear1': {'kernel': np.zeros(()), 'token': np.zeros(())}},
    }
    factors = parameters.rate_factors(params, 0.9)
    assert jax.tree.structure(factors) == jax.tree.structure(params)
    for path, factor in jax.tree_util.tree_leaves_with_path(factors):
        names = [entry.key for entry in path]
        layer = 12  # the norm, the head
        if names[0] == 'encoder' and names[1].startswith('block'):
            layer = int(names[1].removeprefix('block')) + 1
        elif names[0] == 'encoder' and names[1] != 'norm':
            lowest = {'patch_embedding', 'cls_token', 'mask_token', 'position_embedding'}
            assert names[1] in lowest
            layer = 0
        np.testing.assert_allclose(factor, 0.9 ** (12 - layer), rtol=1e-12, err_msg=str(names))

    params = shapes_of(resnet.make(widths=(8, 16), blocks=(2, 11), stem='cifar'), 1, 8, 8, 3)
    factors = parameters.rate_factors(params, 0.5)
    assert set(jax.tree.leaves(factors['stem'])) == {0.5**14}
    assert set(jax.tree.leaves(factors['stem_norm'])) == {0.5**14}
    order = [f'stage1_block{i}' for i in range(2)] + [f'stage2_block{i}' for i in range(11)]
    for layer, name in enumerate(order):
        assert set(jax.tree.leaves(factors[name])) == {0.5 ** (13 - layer)}


@pytest.mark.parametrize('name', optim.OPTIMISERS)
def test_layer_decay_scales_what_the_optimiser_does(name):
    params = {'encoder': {'cls_token': 1.0, 'block0': 2.0, 'block1': 3.0, 'norm': 4.0}, 'head': 5.0}
    params = jax.tree.map(lambda x: jnp.full((3, 2), x), params)
    factors = {'encoder': {'cls_token': 0.125, 'block0': 0.25, 'block1': 0.5, 'norm': 1.0}}
    factors['head'] = 1.0
    updates = []
    for layer_decay in (1.0, 0.5):
        tx, _ = optim.make(name=name, layer_decay=layer_decay, final_weight_decay=0.4, **SHARED)
        state = tx.init(params)
        for g in (1.0, -3.0):
            gradients = jax.tree.map(lambda x, g=g: g * x, params)
            out, state = jax.jit(tx.update)(gradients, state, params)
        updates.append(out)
    want = jax.tree.map(lambda u, f: f * u, updates[0], factors)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), updates[1], want)


def test_layer_decay_without_layers():
    tx, _ = optim.make(name='adamw', layer_decay=0.5, **SHARED)
    params = {'linear': jnp.ones((2, 2))}
    with pytest.raises(UserError, match=r'layer_decay: got 0.5, but the parameters'):
        tx.update(params, tx.init(params), params)


def two_modules(seed):
    """What a method with a critic beside its encoder may have as parameters."""
    return {'encoder': tree(seed), 'critic': tree(seed + 100), 'scale': np.float64(seed + 2.0)}


def adamw_in_float64(grads, peak, b1, b2, decay, warmup=0.2):
    """A tree's parameters after one step for each of the gradients, by the papers' formulas."""

    def one(path, p, *gs):
        m = v = 0.0
        for step, g in enumerate(gs):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            direction = (m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8)
            rise = round(warmup * STEPS)
            progress = (step - rise) / (STEPS - rise)
            share = step / rise if step < rise else 0.5 * (1 + np.cos(np.pi * progress))
            kernel = getattr(path[-1], 'key', '') in DECAYED
            p = p - peak * BATCH / 256 * share * (direction + decay * kernel * p)
        return p

    return lambda params: jax.tree_util.tree_map_with_path(one, params, *grads)


def run(tx, params, grads):
    params = jax.tree.map(jnp.float32, params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(jax.tree.map(jnp.float32, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_modules_equal_optimisers_of_their_own():
    critic = {'learning_rate': 0.05, 'b1': 0.5, 'weight_decay': 0.4, 'warmup': 0.0}
    tx, schedule = optim.make(
        name='adamw', warmup=0.2, modules={'critic': critic}, **SHARED, **BETAS
    )
    params, grads = two_modules(0), [two_modules(i + 1) for i in range(4)]
    got = run(tx, params, grads)

    def of(*names):
        return [{k: g[k] for k in names} for g in (params, *grads)]

    for names, want in (
        (('encoder', 'scale'), {'peak': 0.3, **BETAS, 'decay': 0.2}),
        (('critic',), {'peak': 0.05, 'b1': 0.5, 'b2': BETAS['b2'], 'decay': 0.4, 'warmup': 0.0}),
    ):
        start, *own = of(*names)
        wanted = adamw_in_float64(own, **want)(start)
        close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
        jax.tree.map(close, {k: got[k] for k in names}, wanted)
    np.testing.assert_allclose(schedule(1), rate(1), rtol=1e-6)  # that of the others


@pytest.mark.parametrize('name', optim.OPTIMISERS)
@pytest.mark.parametrize('other', ['adamw', 'lars'])
def test_a_module_may_have_another_optimiser(name, other):
    """And its options are not those of the others."""
    options = {'b1': 0.5, 'b2': 0.5} if name in ('adamw', 'lamb') else {'momentum': 0.5}
    changes = {'name': other, 'learning_rate': 0.1, 'final_weight_decay': 0.9}
    params, grads = two_modules(0), [two_modules(1), two_modules(2)]
    mixed, _ = optim.make(name=name, modules={'critic': changes}, **SHARED, **options)
    main, _ = optim.make(name=name, **SHARED, **options)
    kept = options if other == name else {}
    own, _ = optim.make(**{**SHARED, **kept, **changes})
    got = run(mixed, params, grads)
    for tx, names in ((main, ('encoder', 'scale')), (own, ('critic',))):
        start, *gs = ({k: p[k] for k in names} for p in (params, *grads))
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(close, {k: got[k] for k in names}, run(tx, start, gs))


def test_the_norm_and_the_layers_are_those_of_all_modules():
    params = {'encoder': {'block0': 1.0, 'block1': 1.0}, 'critic': {'block0': 1.0, 'linear': 1.0}}
    params = jax.tree.map(lambda x: jnp.full((2, 2), x), params)
    gradients = jax.tree.map(lambda x: 3.0 * x, params)  # of norm 12
    plain = {'learning_rate': 0.5, 'total_steps': STEPS, 'batch_size': 256, 'momentum': 0.0}
    tx, _ = optim.make(
        name='sgd', clip_norm=6.0, layer_decay=0.5, modules={'critic': {'learning_rate': 5.0}},
        **plain,
    )  # fmt: skip
    updates, _ = tx.update(gradients, tx.init(params), params)
    # (3 / 2) · rate · factor
    want = {
        'encoder': {'block0': 0.1875, 'block1': 0.375},
        'critic': {'block0': 3.75, 'linear': 7.5},
    }
    jax.tree.map(lambda u, w: np.testing.assert_allclose(u, np.full((2, 2), -w)), updates, want)


def test_modules_survive_a_checkpoint(tmp_path):
    tx, _ = optim.make(
        name='adamw', clip_norm=1.0, modules={'critic': {'name': 'lars'}, 'scale': {'b1': 0.5}},
        **SHARED,
    )  # fmt: skip
    params = jax.tree.map(jnp.float32, two_modules(0))
    _, saved = tx.update(params, tx.init(params), params)
    state = TrainState(jnp.int32(1), params, saved, {})
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best='none')
    checkpoints.save(state, None, 1)
    checkpoints.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
    restored = checkpoints.restore(like)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_module_that_is_not_there():
    tx, _ = optim.make(name='adamw', modules={'critics': {}}, **SHARED)
    with pytest.raises(UserError) as error:
        tx.init(jax.tree.map(jnp.float32, two_modules(0)))
    for part in ('optim.modules', "'critics'", "Did you mean 'critic'", "'critic', 'encoder', 'sc"):
        assert part in str(error.value)


TABLE = """
cls_token                   tokens     0.125
mask_token                  tokens     0.125
register_tokens             tokens     0.125
position_embedding          positions  0.125
patch_embedding/kernel      kernels    0.025
patch_embedding/bias        vectors    0.0125
block0/attention/qkv/kernel kernels    0.25
block0/attention/qkv/bias   vectors    0.125
block0/norm1/scale          vectors    0.125
block0/layer_scale1         vectors    0.125
block1/mlp2/kernel          kernels    0.5
norm/scale                  vectors    0.5
head/last/kernel            kernels    1.0
head/last/length            kernels    1.0
logit_scale                 vectors    0.5
"""


def kinds_and_factors(params, **options):
    """Name -> (kind, factor) of every parameter."""
    kinds, factors = parameters.kinds(params), parameters.rate_factors(params, **options)
    assert jax.tree.structure(kinds) == jax.tree.structure(factors) == jax.tree.structure(params)
    return {
        '/'.join(parameters.names(path)): (kind, factor)
        for (path, kind), factor in zip(
            jax.tree_util.tree_leaves_with_path(kinds), jax.tree.leaves(factors), strict=True
        )
    }


def test_every_parameter_has_a_kind_and_a_factor():
    small = vit.make(
        width=16, depth=2, heads=2, patch=4, position='learned', layer_scale=0.1, registers=3
    )
    params = {
        **shapes_of(small, 1, 8, 8, 3, mask=jnp.zeros((1, 4), bool)),
        'head': {'last': {'kernel': jnp.zeros((4, 8)), 'length': jnp.ones((1, 8))}},
        'logit_scale': jnp.zeros(()),
    }
    found = kinds_and_factors(params, layer_decay=0.5, patch_embedding=0.2, vectors=0.5)
    for name, (kind, factor) in found.items():
        print(f'{name:27} {kind:10} {factor:g}')
    for line in TABLE.strip().splitlines():
        name, kind, factor = line.split()
        assert found[name] == (kind, pytest.approx(float(factor))), name


@pytest.mark.parametrize('name', ['vit', 'resnet', 'transformer', 'nin', 'dcgan', 'lab'])
def test_kinds_of_every_model(name):
    """Matrices are kernels or the texts' table; no other rule than the name says a token."""
    image = jnp.zeros((1, 8, 8, 3))
    made = {
        'vit': lambda: shapes_of(
            vit.make(width=16, depth=1, heads=2, patch=4, position='learned', pool='map'),
            *image.shape, mask=jnp.zeros((1, 4), bool),
        ),
        'resnet': lambda: shapes_of(
            resnet.make(widths=(8,), blocks=(1,), stem='cifar'), *image.shape
        ),
        'dcgan': lambda: shapes_of(dcgan.make(widths=(8, 8)), *image.shape),
        'lab': lambda: shapes_of(
            lab.make(encoder={'name': 'dcgan', 'widths': (8,)}, sees=('L', 'ab')), *image.shape
        ),
        'nin': lambda: shapes_of(nin.make(widths=(8, 8, 8), width=8), *image.shape),
        'transformer': lambda: jax.eval_shape(
            partial(models.init, transformer.make(vocabulary=11, length=5, width=8, depth=1,
                                                  heads=2)),
            jax.random.key(0), jnp.zeros((1, 5), jnp.int32),
        )[0],
    }  # fmt: skip
    assert set(made) == {m.name for m in pkgutil.iter_modules(models.__path__)}
    special = {
        'token_embedding': 'embeddings',
        'position_embedding': 'positions',
        **dict.fromkeys(('cls_token', 'mask_token', 'register_tokens', 'probe'), 'tokens'),
        'kernel': 'kernels',
    }
    for path, (kind, factor) in kinds_and_factors(made[name]()).items():
        assert (kind, factor) == (special.get(path.split('/')[-1], 'vectors'), 1.0), path


def test_who_is_decayed():
    """By default what LARS' and AdamW's authors decay; everything, as torch does; DINO's choice."""
    params = {**tree(0), 'token_embedding': np.ones((5, 3))}
    for kinds, left in (
        (('kernels', 'embeddings'), {'bias', 'cls_token', 'position_embedding', 'temperature'}),
        (parameters.KINDS, set()),
        (('kernels', 'positions', 'tokens'), {'bias', 'temperature', 'token_embedding'}),
    ):
        tx, _ = optim.make(
            name='adamw', learning_rate=1.0, total_steps=9, batch_size=256, weight_decay=0.1,
            decayed=kinds,
        )  # fmt: skip
        params = jax.tree.map(jnp.float32, params)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        still = {k for k, u in updates.items() if not jnp.any(u)}
        assert still == left


@pytest.mark.parametrize('coefficient', [0.001, 0.5, 50.0])
@pytest.mark.parametrize('clip', [False, True])
def test_lars_as_in_torch(clip, coefficient):
    """v ← m v + local·(g + λw), w ← w − rate·v (BYOL, Barlow Twins, VICReg); solo-learn's local
    rate is min(coefficient·|w| / |g + λw|, rate) / rate."""
    tx, _ = optim.make(
        name='lars', warmup=0.2, classic_momentum=False, clip_ratio=clip,
        trust_coefficient=coefficient, **SHARED,
    )  # fmt: skip
    start, grads = tree(0), [tree(i + 1) for i in range(4)]
    got = run(tx, start, grads)
    for name, p in start.items():
        v = 0.0
        for step, g in enumerate(g[name] for g in grads):
            local = 1.0
            if name in DECAYED:
                g = g + 0.2 * p
                local = coefficient * norm(p) / norm(g)
                if clip:
                    local = min(local, rate(step)) / rate(step) if step else 1.0
            v = 0.9 * v + local * g
            p = p - rate(step) * v
        np.testing.assert_allclose(got[name], p, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize('by', ['all', 'module', 'tensor'])
def test_clipping_by(by):
    """One norm of everything, one a module (DINOv2), one a tensor (DINO)."""
    gradients = {'encoder': {'a': [3.0, 4.0], 'b': [0.3, 0.4]}, 'head': {'c': [12.0, 0.0]}}
    gradients = jax.tree.map(jnp.asarray, gradients, is_leaf=lambda x: isinstance(x, list))
    tx, _ = optim.make(
        name='sgd', learning_rate=1.0, total_steps=9, batch_size=256, momentum=0.0, clip_norm=2.0,
        clip_by=by,
    )  # fmt: skip
    updates, _ = tx.update(gradients, tx.init(gradients), gradients)
    encoder = np.sqrt(25 + 0.25)
    norms = {
        'all': {'a': np.sqrt(encoder**2 + 144), 'b': np.sqrt(encoder**2 + 144)},
        'module': {'a': encoder, 'b': encoder, 'c': 12.0},
        'tensor': {'a': 5.0, 'b': 0.5, 'c': 12.0},
    }[by]
    norms.setdefault('c', norms['a'])
    for name, g in {**gradients['encoder'], **gradients['head']}.items():
        want = g * min(1.0, 2.0 / norms[name])
        got = {**updates['encoder'], **updates['head']}[name]
        np.testing.assert_allclose(got, -want, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('name', ['adamw', 'lars'])
def test_a_frozen_module_begins_anew(name):
    """As `p.grad = None` in torch: no motion, no decay, no moments; then the schedule's rate."""
    module = {'frozen': 0.3, 'final_weight_decay': 0.9}
    tx, _ = optim.make(name=name, warmup=0.2, modules={'critic': module}, **SHARED)
    plain, _ = optim.make(name=name, warmup=0.2, final_weight_decay=0.9, **SHARED)
    params = {'critic': jax.tree.map(jnp.float32, tree(0)), 'encoder': jnp.ones((2, 2))}
    grads = [{'critic': tree(i + 1), 'encoder': np.ones((2, 2))} for i in range(5)]
    still = run(tx, params, grads[:3])
    jax.tree.map(np.testing.assert_array_equal, still['critic'], params['critic'])
    assert not np.array_equal(still['encoder'], params['encoder'])

    # The same as an optimiser whose memory is empty at step 3.
    def at_step_3(state):
        return jax.tree.map(lambda x: jnp.full_like(x, 3) if x.dtype == jnp.int32 else x, state)

    if name == 'lars':  # Adam's own count, of its bias correction, begins at the thaw
        state, critic = at_step_3(plain.init(params['critic'])), params['critic']
        for g in grads[3:]:
            updates, state = plain.update(jax.tree.map(jnp.float32, g['critic']), state, critic)
            critic = optax.apply_updates(critic, updates)
        got = run(tx, params, grads)['critic']
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, critic)
        return
    moved = run(tx, params, grads[:4])['critic']
    for k, p in tree(0).items():
        decays = decay(k, 3, 0.9)
        want = p - rate(3) * (np.sign(grads[3]['critic'][k]) + decays * p)
        np.testing.assert_allclose(moved[k], want, rtol=1e-4, atol=1e-5, err_msg=k)


def test_a_module_within_another():
    """The innermost path that has a parameter owns it."""
    params = {'head': {'mlp': jnp.ones((2, 2)), 'last': {'kernel': jnp.ones((2, 2))}}}
    rates = {'head': {'learning_rate': 2.0}, 'head/last': {'learning_rate': 3.0}}
    tx, _ = optim.make(
        name='sgd', learning_rate=1.0, total_steps=9, batch_size=256, momentum=0.0, modules=rates
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(updates['head']['mlp'][0, 0]) == -2.0
    assert float(updates['head']['last']['kernel'][0, 0]) == -3.0
    wrong, _ = optim.make(name='sgd', modules={'head/lost': {}}, **SHARED)
    with pytest.raises(UserError, match=r"'head/lost'. Did you mean 'head/last'\?"):
        wrong.init(params)


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
        tx, _ = optim.make(
            name=name, clip_norm=1.0, layer_decay=0.9, final_weight_decay=0.4, **SHARED
        )
        params = {'block0': jax.tree.map(jnp.float32, tree(0))}
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
        ({'warmup': 10.0}, ['config.optim.warmup', '10.0', 'from 0 to 1']),
        ({'final_fraction': 2.0}, ['config.optim.final_fraction']),
        ({'milestones': (0.5, 60.0)}, ['config.optim.milestones[1]', '60.0', 'from 0 to 1']),
        ({'milestone_factor': 10.0}, ['config.optim.milestone_factor', 'from 0 to 1']),
        ({'milestones': (0.5,), 'final_fraction': 0.1}, ['final_fraction=0.1', 'cosine']),
        ({'weight_decay': -0.1}, ['config.optim.weight_decay']),
        ({'clip_norm': -0.1}, ['config.optim.clip_norm']),
        ({'final_weight_decay': -0.1}, ['config.optim.final_weight_decay', 'at least 0']),
        ({'layer_decay': 1.5}, ['config.optim.layer_decay', '1.5', 'from 0 to 1']),
        ({'scaling': 'lineer'}, ["'lineer'", "Did you mean 'linear'", "'linear', 'sqrt'"]),
        ({'layer_decai': 0.9}, ["'layer_decai'", "Did you mean 'layer_decay'"]),
        ({'total_steps': 0}, ['config.total_steps', 'at least 1']),
        ({'momentun': 0.9}, ["'momentun'", "Did you mean 'momentum'"]),
        ({'warmpu': 0.1}, ["'warmpu'", "Did you mean 'warmup'"]),
        ({'b1': 0.9}, ["key for sgd 'b1'", "'momentum'"]),
        ({'momentum': 1.5}, ['momentum', '1.5']),
        ({'modules': {'critic': {'momentum': 1.5}}}, ['optim.modules.critic.momentum', '1.5']),
        ({'modules': {'critic': {'b1': 0.5}}}, ['optim.modules.critic', "key for sgd 'b1'"]),
        ({'modules': {'critic': {'clip_norm': 1.0}}}, ['optim.modules.critic', "'clip_norm'"]),
        ({'modules': {'critic': {'total_steps': 9}}}, ['optim.modules.critic', "'total_steps'"]),
        ({'modules': {'critic': {'name': 'adan'}}}, ['optim.modules.critic', "'adamw'"]),
        ({'module': {}}, ["Did you mean 'modules'"]),
    ],
)
def test_errors_say_what_to_do(change, parts):
    with pytest.raises(UserError) as error:
        optim.make(**{'name': 'sgd', **SHARED, **change})
    for part in parts:
        assert part in str(error.value)
