"""Augmentation of local views (multi-crop), and the step that it is part of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from contrastive_jax import augment, state
from contrastive_jax.config import UserError
from contrastive_jax.method import Aux, Method

S, SMALL = 16, 8
UNIT = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}
# Quickly compiled; noise has a key of its own.
CHEAP = {name: {'prob': 0.9} for name in ('rotate90', 'grayscale', 'noise')}


def pixels(b: int, v: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (b, v, size, size, 3)).astype(np.uint8)


def multi_crop(spec, x: np.ndarray, local: np.ndarray, key: int = 0):
    """Augmented (views, local views)."""
    apply = augment.make(
        spec,
        views=x.shape[1],
        image_size=x.shape[2],
        local_views=local.shape[1],
        local_size=local.shape[2],
        **UNIT,
    )
    given = {'views': x, 'local_views': local, 'label': np.arange(len(x))}
    out = jax.jit(apply)(jax.random.key(key), given)
    np.testing.assert_array_equal(out['label'], given['label'])
    return np.asarray(out['views']), np.asarray(out['local_views'])


def test_local_views_leave_the_draws_of_the_others_alone():
    x, local = pixels(16, 2, S), pixels(16, 3, SMALL)
    views, augmented = multi_crop(CHEAP, x, local)
    alone = jax.jit(augment.make(CHEAP, views=2, image_size=S, **UNIT))
    # Another program may round otherwise.
    expected = alone(jax.random.key(0), {'views': x})['views']
    np.testing.assert_allclose(views, expected, atol=1e-6)
    assert augmented.dtype == np.float32
    assert augmented.shape == local.shape
    # 0.1^3 of the images keep their bits.
    assert (np.abs(augmented - local / 255).max((2, 3, 4)) > 1e-5).mean() > 0.95


def test_last_prob_is_the_frequency_in_all_local_views():
    x = np.random.default_rng(0).integers(1, 128, (600, 2, 4, 4, 3)).astype(np.uint8)
    local = np.random.default_rng(1).integers(128, 256, (600, 3, 8, 8, 3)).astype(np.uint8)
    spec = {'solarize': {'prob': (0.0, 0.4, 0.3), 'threshold': 0.0}}
    views, augmented = multi_crop(spec, x, local)
    done = np.abs(views - x / 255).max((2, 3, 4)) > 1e-5
    local_done = np.abs(augmented - local / 255).max((2, 3, 4)) > 1e-5
    assert not done[:, 0].any()
    assert abs(done[:, 1].mean() - 0.4) < 4 * np.sqrt(0.24 / 600)
    for rate in local_done.mean(0):
        assert abs(rate - 0.3) < 4 * np.sqrt(0.21 / 600)
    # Independent of each other and of the views.
    coins = np.corrcoef(np.concatenate([done[:, 1:], local_done], 1).T)
    assert np.abs(coins - np.eye(4)).max() < 4 / np.sqrt(600)


def test_a_number_is_for_local_views_too_and_their_size_counts():
    x, local = np.zeros((1, 1, 16, 16, 3), np.uint8), np.zeros((1, 2, 40, 40, 3), np.uint8)
    x[:, :, 8, 8] = local[:, :, 20, 20] = 255
    views, augmented = multi_crop({'blur': {'prob': 1, 'sigma': 2.0}}, x, local)
    np.testing.assert_array_equal(np.flatnonzero(views[0, 0, 8, :, 0]), [7, 8, 9])
    for view in augmented[0]:
        np.testing.assert_array_equal(np.flatnonzero(view[20, :, 0]), [18, 19, 20, 21, 22])


def test_local_views_are_the_same_on_eight_devices():
    x, local = pixels(16, 2, S), pixels(16, 3, SMALL)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec('data'))
    with jax.set_mesh(mesh):
        spread = multi_crop(CHEAP, jax.device_put(x, rows), jax.device_put(local, rows))
    for ours, other in zip(spread, multi_crop(CHEAP, x, local), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-6)


@pytest.mark.parametrize(
    ('spec', 'changes', 'message'),
    [
        (
            {'blur': {'prob': (1.0, 0.1)}},
            {},
            r'blur.prob: .* each of the 2 views and a last one for the local views \(3 in all\)',
        ),
        ({'blur': {'prob': (1.0, 0.1, 1.5)}}, {}, r'blur.prob: got 1.5; .*from 0 to 1'),
        ({'blur': {'prob': 1, 'kernel': 17}}, {}, r'below twice the side \(8\), got 17'),
        ({}, {'local_views': -1}, r'config.inputs.local_views: got -1; .* of at least 0'),
        ({}, {'local_size': 0}, r'config.inputs.local_size: got 0; .* of at least 1'),
    ],
)
def test_errors_of_local_views(spec, changes, message):
    options = {'views': 2, 'image_size': S, 'local_views': 3, 'local_size': SMALL, **changes}
    with pytest.raises(UserError, match=message):
        augment.make(spec, **options, **UNIT)


def test_local_views_of_another_shape():
    apply = augment.make({}, views=2, image_size=S, local_views=3, local_size=SMALL, **UNIT)
    given = {'views': jnp.asarray(pixels(1, 2, S)), 'local_views': jnp.asarray(pixels(1, 2, SMALL))}
    with pytest.raises(UserError, match=r"views uint8\['B', 3, 8, 8, 3\], got uint8\[1, 2, 8"):
        apply(jax.random.key(0), given)


@pytest.mark.parametrize('accumulate', [1, 4])
def test_a_micro_batch_holds_the_local_views_of_its_images(accumulate):
    row = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1, 1)
    given = {
        'views': np.broadcast_to(row, (16, 2, S, S, 3)),
        'local_views': np.broadcast_to(row, (16, 3, SMALL, SMALL, 3)),
    }

    def loss(params, extra, part, key, progress):
        views, local = (part[k].reshape(16 // accumulate, -1) for k in given)
        apart = jnp.abs(views[:, :1] - local).max()
        return params['w'] * local.mean(), Aux(extra, {'apart': apart})

    tx = optax.sgd(1.0)
    params = {'w': jnp.ones(())}
    apply = augment.make({}, views=2, image_size=S, local_views=3, local_size=SMALL, **UNIT)
    method = Method(lambda *_: None, loss, lambda *_: {})
    step = jax.jit(state.make_step(method, tx, apply, 0, 10, accumulate))
    start = state.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), {})
    _, metrics = step(start, given)
    assert metrics['apart'] == 0
    np.testing.assert_allclose(metrics['loss'], 7.5 / 255, rtol=1e-4)  # a long sum
