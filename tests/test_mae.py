"""MAE beside float64: loss, gradients, drawn images; what is hidden is not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle as o
import pytest

from contrastive_jax import models
from contrastive_jax.config import UserError, build
from contrastive_jax.methods import mae
from contrastive_jax.models import vit

B, ROWS, COLUMNS, PATCH, HEADS = 4, 2, 4, 2, 2
N, SEEN = ROWS * COLUMNS, 2
VIT = {'width': 16, 'depth': 2, 'heads': HEADS, 'patch': PATCH, 'start': 'mae'}
DECODER = {'width': 8, 'depth': 1, 'heads': HEADS}


def method(**options):
    model = vit.make(**VIT, activation='gelu')
    return build(
        'methods', {'name': 'mae', 'activation': 'gelu', **DECODER, **options}, 'test', model
    )


def images(seed=0, count=B):
    shape = (count, ROWS * PATCH, COLUMNS * PATCH, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def started(m, seed=1):
    """Parameters at random, so that none that is mixed up goes unseen."""
    batch = {'views': jnp.asarray(images())[:, None]}
    params, extra = m.init(jax.random.key(0), batch, 10)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x + 0.2 * rng.normal(size=x.shape)), params), extra


def cut(image):
    """Patches in row-major order, each pixel by pixel in rows, channels last."""
    P = PATCH
    places = [(r * P, c * P) for r in range(ROWS) for c in range(COLUMNS)]
    return jnp.stack([image[r : r + P, c : c + P].reshape(-1) for r, c in places])


def draw(params, image, order):
    """The authors' forward pass on one image; `order`: its patches, those seen first."""
    p = params['encoder']
    x = o.dense(p['patch_embedding'], cut(image)) + o.sincos(ROWS, COLUMNS, 16)
    x = jnp.concatenate([p['cls_token'][0], x[order[:SEEN]]])
    x = o.blocks(p, x, HEADS)
    return o.mae_decoder(params['decoder'], x[0], x[1:], order, ROWS, COLUMNS, HEADS)


def test_loss_and_gradients_are_the_authors():
    m = method()
    params, extra = started(m)
    batch, key = {'views': jnp.asarray(images(3))[:, None]}, jax.random.key(7)
    step = jax.jit(jax.value_and_grad(m.loss, has_aux=True))
    (value, _), gradients = step(params, extra, batch, key, jnp.float32(0))
    noise = jax.random.uniform(jax.random.split(key)[0], (B, N))
    orders = np.argsort(noise, axis=1)

    def loss(params):
        each = [
            o.mae_loss(draw(params, image, order), cut(image), order, SEEN)
            for image, order in zip(images(3).astype(np.float64), orders, strict=True)
        ]
        return jnp.stack(each).mean()

    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        want, wants = jax.value_and_grad(loss)(wide)
    assert np.isclose(value, want, rtol=1e-5)
    for (path, g), w in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wants), strict=True
    ):
        g, w = np.asarray(g), np.asarray(w)
        assert np.abs(g - w).max() <= 2e-5 * max(np.abs(w).max(), 1e-2), path


def test_the_encoder_sees_what_is_kept_alone_and_in_its_order():
    module = vit.make(**VIT)
    x, keep = jnp.asarray(images(4, 2)), jnp.asarray([[5, 0, 3], [2, 1, 7]], jnp.int32)
    params, stats = models.init(module, jax.random.key(0), x)
    (features, named), _ = models.apply(module, params, stats, x, False, keep=keep)
    assert named['patches'].shape == (2, 3, 16)
    assert named['attention'].shape == (2, HEADS, 3)
    # Whatever the others are.
    other = np.full_like(x, 9.0)
    for i, j in np.ndindex(2, 3):
        r, c = divmod(int(keep[i, j]), COLUMNS)
        at = i, slice(r * PATCH, (r + 1) * PATCH), slice(c * PATCH, (c + 1) * PATCH)
        other[at] = x[at]
    (same, _), _ = models.apply(module, params, stats, jnp.asarray(other), False, keep=keep)
    np.testing.assert_array_equal(features, same)
    # All of them, in another order, are the image.
    order = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(N), (2, 1)), axis=1))
    (_, whole), _ = models.apply(module, params, stats, x, False)
    (_, mixed), _ = models.apply(module, params, stats, x, False, keep=order.astype(jnp.int32))
    wanted = jnp.take_along_axis(whole['patches'], order[:, :, None], 1)
    np.testing.assert_allclose(mixed['patches'], wanted, atol=1e-5)
    np.testing.assert_allclose(mixed['cls'], whole['cls'], atol=1e-5)
    for wrong in (keep.astype(jnp.float32), keep[:1]):
        with pytest.raises(ValueError, match=r'patches to keep, int32\[2, n\]'):
            models.apply(module, params, stats, x, False, keep=wrong)


@pytest.mark.parametrize('normalise', [True, False])
def test_evaluators_see_whole_images_and_what_is_drawn(normalise):
    m = method(normalise=normalise)
    params, extra = started(m)
    x = images(5)
    found = jax.jit(m.encode)(params, extra, {'image': x})
    (features, _), _ = models.apply(
        vit.make(**VIT, activation='gelu'), params['encoder'], {}, x, False
    )
    np.testing.assert_allclose(found['features'], features, atol=1e-5)
    assert {'block0', 'block1', 'cls', 'patches'} <= found.keys()
    assert found['filled'].shape == x.shape
    assert found['hidden'].shape == (*x.shape[:3], 1)
    for image, filled, hidden in zip(x, found['filled'], found['hidden'], strict=True):
        away = np.asarray(cut(np.asarray(hidden)))[:, 0]
        assert away.sum() == N - SEEN
        true, here = np.float64(cut(image)), cut(filled)
        np.testing.assert_array_equal(here[away == 0], np.float32(true[away == 0]))
        order = np.argsort(away, kind='stable')
        with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
            wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), params)
            want = np.asarray(draw(wide, np.float64(image), order))
        if normalise:
            scale = np.sqrt(true.var(1, ddof=1, keepdims=True) + 1e-6)
            want = want * scale + true.mean(1, keepdims=True)
        np.testing.assert_allclose(here[away == 1], want[away == 1], atol=1e-4)


def test_an_evaluator_s_mask_is_the_image_s_own():
    m = method()
    params, extra = started(m)
    x = images(6)
    encode = jax.jit(lambda x: m.encode(params, extra, {'image': x})['hidden'])
    hidden, reverse = np.asarray(encode(x)), np.asarray(encode(x[::-1]))
    np.testing.assert_array_equal(hidden, reverse[::-1])
    assert len(np.unique(hidden.reshape(B, -1), axis=0)) > 1


def test_without_hidden_patches_it_is_an_autoencoder():
    m = method(mask_ratio=0.0, normalise=False)
    params, extra = started(m)
    batch = {'views': jnp.asarray(images(8))[:, None]}
    value, _ = m.loss(params, extra, batch, jax.random.key(0), jnp.float32(0))
    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), params)
        errors = []
        for image in np.float64(images(8)):
            p = wide['encoder']
            x = o.dense(p['patch_embedding'], cut(image)) + o.sincos(ROWS, COLUMNS, 16)
            x = o.blocks(p, jnp.concatenate([p['cls_token'][0], x]), HEADS)
            order = np.arange(N)
            drawn = o.mae_decoder(wide['decoder'], x[0], x[1:], order, ROWS, COLUMNS, HEADS)
            errors.append(((drawn - cut(image)) ** 2).mean())
    assert np.isclose(value, np.mean(errors), rtol=1e-5)


def test_it_starts_as_the_authors():
    """Xavier-uniform matrices, of q, k and v as one; zero biases; tokens at 0.02."""
    model = vit.make(**{**VIT, 'width': 64})
    m = mae.make(model, width=32, depth=1, heads=4)
    params, _ = m.init(jax.random.key(0), {'views': jnp.asarray(images())[:, None]}, 10)
    matrices = 0
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if name.endswith('token'):
            assert 0.01 < float(x.std()) < 0.03, name
        elif name.endswith('kernel'):
            bound = np.sqrt(6 / sum(x.shape))
            assert 0.9 * bound < float(jnp.abs(x).max()) <= bound, name
            matrices += 1
        else:
            np.testing.assert_array_equal(x, np.full(x.shape, name.endswith('scale')), name)
    assert matrices == 4 * 3 + 3


def test_parts_of_a_batch_keep_their_own_patches():
    """`config.microbatch`: the same loss and gradients."""
    whole = method()
    params, extra = started(whole)
    model = models.Microbatched(vit.make(**VIT, activation='gelu'), 2)
    parts = mae.make(model, activation='gelu', **DECODER)
    batch = {'views': jnp.asarray(images(9))[:, None]}
    found = [
        jax.jit(jax.grad(m.loss, has_aux=True))(
            params, extra, batch, jax.random.key(1), jnp.float32(0)
        )[0]
        for m in (whole, parts)
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'mask_ratio': 1.0}, r'mask_ratio: got 1.0; mae expects'),
        ({'width': 12, 'heads': 5}, r'width: got 12; mae expects a multiple of heads=5'),
        ({'depth': 0}, r'depth: got 0; mae expects'),
        ({'dtype': 'float16'}, r"unknown dtype 'float16'.*'bfloat16'"),
        ({'activation': 'relu'}, r"unknown activation 'relu'.*'gelu'"),
    ],
)
def test_mistakes_are_explained(options, said):
    with pytest.raises(UserError, match=said):
        method(**options)
