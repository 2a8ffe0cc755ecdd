"""I-JEPA: its masks, and its loss and gradients beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle as o
import pytest

from contrastive_jax import models, parallel
from contrastive_jax.augment.masking import block_sizes, multi_block
from contrastive_jax.config import UserError, build
from contrastive_jax.methods import ijepa
from contrastive_jax.models import vit

ROWS, COLUMNS, PATCH, HEADS = 4, 6, 2, 2
N = ROWS * COLUMNS
VIT = {'width': 16, 'depth': 2, 'heads': HEADS, 'patch': PATCH, 'pool': 'mean', 'start': 'mae'}
# Blocks of 2 × 2 or 2 × 3 patches: of the former two places are empty.
MASKS = {'blocks': 2, 'scale': (0.16, 0.26), 'aspect': (0.6, 1.1)}
SMALL = {'width': 8, 'depth': 2, 'heads': HEADS, 'activation': 'gelu'}
B = 4


@pytest.mark.parametrize(('rows', 'columns'), [(16, 16), (14, 14), (8, 8), (8, 12)])
def test_masks(rows, columns):
    """Blocks are whole rectangles of one size and within the ranges; no context is in any."""
    draw = jax.jit(lambda key: multi_block(key, 64, rows, columns))
    sizes, corners, contexts = set(), set(), np.zeros(rows * columns, int)
    for seed in range(40):
        context, targets, counts = (np.asarray(x) for x in draw(jax.random.key(seed)))
        M = counts.sum()
        assert counts[:M].all()
        assert context.shape[1] == rows * columns - 4 * len(counts)
        for seen, blocks in zip(context, targets, strict=True):
            assert len(set(seen)) == len(seen)
            assert not set(seen) & set(blocks.flat)
            contexts[seen] += 1
            for block in blocks:
                r, c = np.divmod(block, columns)
                h, w = np.ptp(r) + 1, np.ptp(c) + 1
                assert len(set(block[:M])) == M == h * w
                assert set(block[M:]) <= {block[0]}
                assert 0.15 <= h * w / (rows * columns) <= 0.2
                assert 0.75 <= h / w <= 1.5
                sizes.add((h, w))
                corners.add(
                    (r.min() == 0, r.max() == rows - 1, c.min() == 0, c.max() == columns - 1)
                )
        assert len({tuple(x) for x in context}) > 1
    assert sorted(sizes) == block_sizes(rows, columns, (0.15, 0.2), (0.75, 1.5))
    assert len(corners) >= 9  # inside, at every side and in every corner
    assert contexts.min() > 0


def test_what_is_seen_is_of_the_context_block_as_long_as_that_has_enough():
    """One of 11 × 11 of 16 × 16 patches; if it has fewer than n, all that it has."""
    context, targets, _ = multi_block(jax.random.key(0), 64, 16, 16, context=(0.47, 0.48))
    n, enough = context.shape[1], []
    for seen, blocks in zip(np.asarray(context), np.asarray(targets), strict=True):
        view, free = np.zeros((16, 16), bool), np.ones((16, 16), bool)
        view.flat[seen], free.flat[blocks.ravel()] = True, False
        squares = [np.s_[i : i + 11, j : j + 11] for i in range(6) for j in range(6)]
        counts = {free[s].sum() for s in squares if view[s].sum() == min(n, free[s].sum())}
        assert counts
        enough.append(max(counts) >= n)
    assert 0 < sum(enough) < 64


def test_block_sizes_of_a_coarse_grid_are_the_nearest():
    assert block_sizes(2, 2, (0.15, 0.2), (0.75, 1.5)) == [(1, 1)]
    assert block_sizes(4, 4, (0.15, 0.2), (0.75, 1.5)) == [(2, 2)]
    assert block_sizes(16, 16, (0.85, 1.0), (1, 1)) == [(15, 15), (16, 16)]


def test_masks_do_not_depend_on_devices():
    found = []
    for devices in (1, 8):
        mesh = parallel.make_mesh(jax.devices()[:devices])
        with jax.set_mesh(mesh):
            rows = parallel.rows(mesh)
            draw = jax.jit(lambda key: multi_block(key, 16, 8, 8)[:2], out_shardings=(rows, rows))
            found.append(jax.device_get(draw(jax.random.key(5))))
    for one, eight in zip(*found, strict=True):
        np.testing.assert_array_equal(one, eight)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'blocks': 0}, 'blocks'),
        ({'blocks': 9}, r'9 blocks of up to 12 patches and a grid of 8 x 8'),
        ({'scale': (0.0, 0.2)}, 'scale'),
        ({'aspect': (1.5, 0.75)}, 'ascending'),
        ({'context': (0.5, 1.1)}, 'context'),
    ],
)
def test_mistakes_in_masks_are_explained(options, said):
    with pytest.raises(UserError, match=said):
        multi_block(jax.random.key(0), 2, 8, 8, **options)


# The method.


def method(model=None, **options):
    model = model or vit.make(**VIT, activation='gelu')
    return build('methods', {'name': 'ijepa', **MASKS, **SMALL, **options}, 'test', model)


def images(seed=0):
    shape = (B, ROWS * PATCH, COLUMNS * PATCH, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def started(m, seed=1):
    """Parameters at random, and another teacher, so that none that is mixed up goes unseen."""
    params, extra = m.init(jax.random.key(0), {'views': jnp.asarray(images())[:, None]}, 10)
    rng = np.random.default_rng(seed)

    def moved(x):
        return np.float32(x + 0.2 * rng.normal(size=x.shape))

    params = jax.tree.map(moved, params)
    target = {**extra['target'], 'params': jax.tree.map(moved, extra['target']['params'])}
    return params, {**extra, 'target': target}


def cut(image):
    P = PATCH
    places = [(r * P, c * P) for r in range(ROWS) for c in range(COLUMNS)]
    return jnp.stack([image[r : r + P, c : c + P].reshape(-1) for r, c in places])


def encoded(p, image, chosen):
    x = o.dense(p['patch_embedding'], cut(image)) + o.sincos(ROWS, COLUMNS, 16)
    return o.blocks(p, x[chosen], HEADS)


@pytest.mark.parametrize(('seed', 'size'), [(7, 4), (10, 6)])
def test_loss_and_gradients_are_the_authors(seed, size):
    """Each image and each block by itself, without the places that do not count."""
    m = method()
    params, extra = started(m)
    batch, key = {'views': jnp.asarray(images(3))[:, None]}, jax.random.key(seed)
    step = jax.jit(jax.value_and_grad(m.loss, has_aux=True))
    (value, aux), gradients = step(params, extra, batch, key, jnp.float32(0))
    masks = multi_block(jax.random.split(key)[0], B, ROWS, COLUMNS, **MASKS)
    context, targets, counts = (np.asarray(x) for x in masks)
    assert counts.sum() == size

    def loss(params, teacher):
        terms = []
        for i, image in enumerate(images(3).astype(np.float64)):
            h = encoded(teacher, image, np.arange(N))
            z = encoded(params['encoder'], image, context[i])
            for block in targets[i][:, counts]:
                drawn = o.ijepa_predictor(
                    params['predictor'], z, context[i], block, ROWS, COLUMNS, HEADS
                )
                terms.append(o.smooth_l1(drawn, o.normalised(h)[block]).mean())
        return jnp.stack(terms).mean()

    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        wide = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64),
            (params, extra['target']['params']['encoder']),
        )
        want, wants = jax.value_and_grad(loss)(*wide)
    assert np.isclose(value, want, rtol=1e-5)
    assert 0 < aux.metrics['output_std'] < 1.5
    for (path, g), w in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wants), strict=True
    ):
        g, w = np.asarray(g), np.asarray(w)
        assert np.abs(g - w).max() <= 2e-5 * max(np.abs(w).max(), 1e-2), path


def test_evaluators_see_the_teacher_on_whole_images():
    m = method()
    params, extra = started(m)
    found = jax.jit(m.encode)(params, extra, {'image': images(5)})
    teacher = extra['target']['params']['encoder']
    (features, _), _ = models.apply(
        vit.make(**VIT, activation='gelu'), teacher, {}, images(5), False
    )
    np.testing.assert_allclose(found['features'], features, atol=1e-5)
    np.testing.assert_allclose(found['features'], found['patches'].mean(1), atol=1e-5)
    assert {'block0', 'block1'} <= found.keys()
    assert m.encoders(params, extra)['image'][0] is teacher


def test_the_teacher_s_momentum_rises_linearly():
    m = method(momentum=0.9)
    params, extra = started(m)
    old, new = extra['target']['params'], {'encoder': params['encoder']}
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        after = m.after(params, extra, None, jnp.float32(progress))['target']['params']
        for x, a, b in zip(*map(jax.tree.leaves, (after, old, new)), strict=True):
            np.testing.assert_allclose(x, momentum * a + (1 - momentum) * b, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_keep_their_own_patches():
    """`config.microbatch`: the same loss and gradients."""
    whole = method()
    params, extra = started(whole)
    parts = method(models.Microbatched(vit.make(**VIT, activation='gelu'), 2))
    batch = {'views': jnp.asarray(images(9))[:, None]}
    found = [
        jax.jit(jax.grad(m.loss, has_aux=True))(
            params, extra, batch, jax.random.key(1), jnp.float32(0)
        )[0]
        for m in (whole, parts)
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_predictor_starts_as_the_encoder():
    """Xavier-uniform matrices, of q, k and v as one; zero biases; the token at 0.02."""
    m = ijepa.make(vit.make(**VIT), **MASKS, width=64, depth=1, heads=4)
    params, _ = m.init(jax.random.key(0), {'views': jnp.asarray(images())[:, None]}, 10)
    matrices = 0
    for path, x in jax.tree.leaves_with_path(params['predictor']):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if name.endswith('token'):
            assert 0.01 < float(x.std()) < 0.03, name
        elif name.endswith('kernel'):
            bound = np.sqrt(6 / sum(x.shape))
            assert 0.9 * bound < float(jnp.abs(x).max()) <= bound, name
            matrices += 1
        else:
            np.testing.assert_array_equal(x, np.full(x.shape, name.endswith('scale')), name)
    assert matrices == 4 + 2


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'width': 12, 'heads': 5}, r'width: got 12; ijepa expects a multiple of heads=5'),
        ({'depth': 0}, r'depth: got 0; ijepa expects'),
        ({'momentum': 1.5}, r'momentum: got 1.5; ijepa expects'),
        ({'dtype': 'float16'}, r"unknown dtype 'float16'.*'bfloat16'"),
        ({'activation': 'relu'}, r"unknown activation 'relu'.*'gelu'"),
    ],
)
def test_mistakes_are_explained(options, said):
    with pytest.raises(UserError, match=said):
        method(**options)
