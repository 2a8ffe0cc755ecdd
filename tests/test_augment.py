"""Augmentation against PIL, SciPy, colorsys and float64 NumPy, and the statistics of its draws.

Tolerances: 1e-5 against float64; 2/255 against PIL, which rounds to uint8 within an operation.
"""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from contrastive_jax import augment
from contrastive_jax.augment import color, geometry
from contrastive_jax.config import UserError

S = 16
UNIT = {'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}
# One spec for several tests, because each new one is compiled.
EVERYTHING = {name: {'prob': 0.7} for name in augment.ORDER}
EVERYTHING['jitter'] |= {'brightness': 2, 'contrast': 2, 'saturation': 2, 'hue': 0.5}
COMPILED = {}
jitter_by = jax.jit(color.jitter_by, static_argnums=3)
LUMA = np.array([0.299, 0.587, 0.114])


def batch(b: int, v: int = 2, size: int = S, seed: int = 0) -> np.ndarray:
    """Smooth images with noise, some extreme values, and grey pixels (no hue)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (b, v, size // 4, size // 4, 3))
    x = coarse.repeat(4, 2).repeat(4, 3) + rng.integers(-20, 21, (b, v, size, size, 3))
    x[:, :, 0, :2] = 0
    x[:, :, 1, :2] = 255
    x[:, :, 2] = x[:, :, 2, :, :1]
    return np.clip(x, 0, 255).astype(np.uint8)


def run(spec, x: np.ndarray, key: int = 0, **moments) -> np.ndarray:
    apply = compiled(spec, x.shape[1], x.shape[2], **(moments or UNIT))
    return np.asarray(apply(jax.random.key(key), x))


def compiled(spec, views: int, image_size: int, **moments):
    name = repr((list(spec.items()), views, image_size, moments))
    if name not in COMPILED:
        make = augment.make(spec, views=views, image_size=image_size, **moments)
        COMPILED[name] = jax.jit(lambda key, x: make(key, {'views': x})['views'])
    return COMPILED[name]


def changed(spec, x: np.ndarray, key: int = 0) -> np.ndarray:
    """Which images [B, V] an operation was applied to."""
    return np.abs(run(spec, x, key) - x / 255).max((2, 3, 4)) > 1e-5


def planes(x: np.ndarray) -> np.ndarray:
    """[..., H, W, 3] to float32 [1, N, 3, P]."""
    x = x.reshape(1, -1, x.shape[-3] * x.shape[-2], 3)
    return np.moveaxis(x, 3, 2).astype(np.float32)


def images(x_BVCP: jax.Array, size: int = S) -> np.ndarray:
    return np.moveaxis(np.asarray(x_BVCP)[0], 1, 2).reshape(-1, size, size, 3)


def oracle_step(name: str, x: np.ndarray, amount: float, additive: bool = False) -> np.ndarray:
    """One of torchvision's colour operations on a float64 image [H, W, 3]."""
    grey = x @ LUMA
    if name == 'hue':
        turned = np.empty_like(x)
        for i, j in np.ndindex(x.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*x[i, j])
            turned[i, j] = colorsys.hsv_to_rgb((h + amount) % 1.0, s, v)
        return turned
    if name == 'brightness' and additive:
        return np.clip(x + amount, 0, 1)
    other = {'brightness': 0.0, 'contrast': grey.mean(), 'saturation': grey[..., None]}[name]
    return np.clip((1 + amount) * x - amount * other, 0, 1)


def by_amount(name: str, x: np.ndarray, amount: float, additive: bool = False) -> np.ndarray:
    """The product's one operation with a given amount, on uint8 [N, S, S, 3]."""
    place = {name: np.zeros((1, len(x)), np.int32)}
    given = {name: np.full((1, len(x)), amount, np.float32)}
    return images(jitter_by(planes(x / 255), place, given, additive))


# --- one operation against its reference


def test_grayscale_is_pils():
    x = batch(8)
    y = run({'grayscale': {'prob': 1}}, x)
    np.testing.assert_allclose(y, np.repeat((x / 255 @ LUMA)[..., None], 3, -1), atol=1e-6)
    pil = np.asarray(Image.fromarray(x[0, 0]).convert('L'))
    assert np.abs(y[0, 0, :, :, 0] * 255 - pil).max() <= 1


@pytest.mark.parametrize('factor', [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize('name', ['brightness', 'contrast', 'saturation'])
def test_blends_are_pils_and_torchvisions(name, factor):
    x = batch(3)[:, 0]
    y = by_amount(name, x, factor - 1)
    enhance = {'saturation': 'Color'}.get(name, name.capitalize())
    for image, ours in zip(x, y, strict=True):
        oracle = oracle_step(name, image / 255, factor - 1)
        np.testing.assert_allclose(ours, oracle, atol=1e-5)
        pil = getattr(ImageEnhance, enhance)(Image.fromarray(image)).enhance(factor)
        assert np.abs(ours * 255 - np.asarray(pil)).max() <= 2


def test_additive_brightness():
    x = batch(2)[:, 0]
    for amount in (-0.4, 0.25):
        y = by_amount('brightness', x, amount, additive=True)
        np.testing.assert_allclose(y, np.clip(x / 255 + amount, 0, 1), atol=1e-6)


@pytest.mark.parametrize('turn', [-0.5, -0.21, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_is_colorsys(turn):
    x = batch(3)[:, 0]
    y = by_amount('hue', x, turn)
    for image, ours in zip(x, y, strict=True):
        np.testing.assert_allclose(ours, oracle_step('hue', image / 255, turn), atol=1e-5)


@pytest.mark.parametrize('additive', [False, True])
def test_jitter_in_every_order(additive):
    names = ('brightness', 'contrast', 'saturation', 'hue')
    orders = list(itertools.permutations(range(4)))
    x = np.random.default_rng(1).random((24, 8, 8, 3))
    place_KN = np.array(orders).T
    rng = np.random.default_rng(2)
    amount_KN = rng.uniform(-0.8, 0.8, (4, 24)) * np.array([[1], [1], [1], [0.5]])
    y = jitter_by(
        planes(x),
        {name: place_KN[k][None] for k, name in enumerate(names)},
        {name: amount_KN[k][None].astype(np.float32) for k, name in enumerate(names)},
        additive,
    )
    for n, ours in enumerate(images(y, 8)):
        oracle = x[n]
        for k in np.argsort(place_KN[:, n]):
            oracle = oracle_step(names[k], oracle, amount_KN[k, n], additive)
        np.testing.assert_allclose(ours, oracle, atol=1e-5)


@pytest.mark.parametrize(
    ('size', 'kernel', 'sigma'), [(8, None, 0.2), (32, None, 2.0), (64, None, 1.2), (16, 13, 2.0)]
)
def test_blur_is_torchvisions(size, kernel, sigma):
    x = batch(2, 1, size)
    radius = max(1, size // 10 // 2) if kernel is None else kernel // 2
    y = run({'blur': {'prob': 1, 'sigma': sigma, 'kernel': kernel}}, x)
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    oracle = x / 255
    for axis in (2, 3):
        # NumPy's and torchvision's 'reflect' is SciPy's 'mirror'.
        oracle = scipy.ndimage.convolve1d(oracle, taps / taps.sum(), axis, mode='mirror')
    np.testing.assert_allclose(y, oracle, atol=1e-5)


def test_blur_draws_a_sigma_for_each_image():
    x = np.zeros((2000, 1, 10, 10, 3), np.uint8)
    x[:, :, 5, 5] = 255
    peak = run({'blur': {'prob': 1, 'sigma': (0.5, 2.0)}}, x)[:, 0, 5, 5, 0].astype(np.float64)
    # Three taps: the peak is w0², w0 = 1 / (1 + 2 exp(-1 / 2 sigma²)).
    sigma = np.sqrt(-0.5 / np.log((1 / np.sqrt(peak) - 1) / 2))
    assert scipy.stats.kstest(sigma, 'uniform', (0.5, 1.5)).pvalue > 1e-3


def test_solarize_is_pils():
    x = batch(4)
    for threshold in (128, 255):
        # 0.5 is PIL's default of 128.
        option = {'threshold': threshold / 255} if threshold != 128 else {}
        y = run({'solarize': {'prob': 1, **option}}, x)
        for image, ours in zip(x.reshape(-1, S, S, 3), y.reshape(-1, S, S, 3), strict=True):
            pil = ImageOps.solarize(Image.fromarray(image), threshold)
            np.testing.assert_array_equal(np.rint(ours * 255), np.asarray(pil))


def test_rotate90_is_numpys():
    x = batch(3)
    turns = np.array([[0, 1], [2, 3], [1, 0]])
    y = np.asarray(jax.jit(geometry.rotate_by)(np.moveaxis(x, 4, 2), turns))
    for i in np.ndindex(turns.shape):
        np.testing.assert_array_equal(np.moveaxis(y[i], 0, 2), np.rot90(x[i], turns[i]))


def test_rotate90_angles_are_equally_likely():
    x = np.zeros((3000, 1, 4, 4, 3), np.uint8)
    x[:, :, 0, 0] = 255
    y = run({'rotate90': {'prob': 0.6}}, x)[:, 0, :, :, 0]
    counts = [int(y[:, i, j].sum()) for i, j in ((0, 0), (0, -1), (-1, -1), (-1, 0))]
    assert scipy.stats.chisquare(counts, [1200, 600, 600, 600]).pvalue > 1e-3


def test_sobel_is_scipys():
    x = batch(4)
    y = run({'sobel': {'prob': 1}}, x)
    grey = x / 255 @ LUMA
    for i in np.ndindex(grey.shape[:2]):
        gx, gy = (scipy.ndimage.sobel(grey[i], axis, mode='nearest') for axis in (1, 0))
        np.testing.assert_allclose(y[i][..., 0], np.sqrt((gx**2 + gy**2) / 20), atol=1e-5)
    np.testing.assert_array_equal(y, np.repeat(y[..., :1], 3, -1))


def test_sobel_reaches_one_and_no_more():
    x = np.zeros((1, 1, 3, 3, 3), np.uint8)
    x[0, 0, :, 2] = x[0, 0, 2, 1] = 255
    np.testing.assert_allclose(run({'sobel': {'prob': 1}}, x)[0, 0, 1, 1], 1.0, atol=1e-6)


def test_cutout_area_and_position():
    x = np.full((4000, 1, S, S, 3), 255, np.uint8)
    y = run({'cutout': {'prob': 1, 'size': 0.25, 'fill': 0.2}}, x)[:, 0]
    hole = np.abs(y - 0.2) < 1e-6
    assert np.all(hole | (y == 1))
    assert np.all(hole == hole[..., :1])
    hole = hole[..., 0]
    rows, columns = hole.any(2).sum(1), hole.any(1).sum(1)
    np.testing.assert_array_equal(hole.sum((1, 2)), rows * columns)
    # Centre c covers c-2 .. c+1.
    covered = np.array([sum(c - 2 <= i < c + 2 for c in range(S)) for i in range(S)]) / S
    error = np.sqrt(np.outer(covered, covered) / len(y))
    assert np.all(np.abs(hole.mean(0) - np.outer(covered, covered)) < 5 * error)
    assert np.all(rows <= 4)
    assert np.mean(rows == 4) == pytest.approx(13 / 16, abs=0.04)


def test_cutout_sizes_are_in_their_range():
    x = np.full((500, 1, S, S, 3), 255, np.uint8)
    y = run({'cutout': {'prob': 1, 'size': (0.25, 0.5)}}, x)[:, 0, :, :, 0]
    rows = (y == 0).any(2).sum(1)
    assert rows.max() == 8
    assert np.all(rows >= 2)


def test_noise_moments():
    x = np.full((200, 1, S, S, 3), 128, np.uint8)
    z = (run({'noise': {'prob': 1, 'std': 0.05}}, x) - 128 / 255) / 0.05
    assert abs(z.mean()) < 0.02
    assert z.std() == pytest.approx(1, abs=0.02)
    assert scipy.stats.kstest(z[:20].ravel(), 'norm').pvalue > 1e-3
    flat = z.reshape(-1, 3)
    assert np.abs(np.corrcoef(flat.T) - np.eye(3)).max() < 0.02


# --- draws


def test_jitter_draws():
    x = np.full((4000, 1, 1, 1, 3), 64, np.uint8)
    off = {'contrast': 0.0, 'saturation': 0.0, 'hue': 0.0}
    factor = run({'jitter': {'prob': 1, 'brightness': 0.8, **off}}, x)[:, 0, 0, 0, 0] * 255 / 64
    assert scipy.stats.kstest(factor, 'uniform', (0.2, 1.6)).pvalue > 1e-3
    # A strength above 1 starts at a factor of 0, as torchvision's does.
    factor = run({'jitter': {'prob': 1, 'brightness': 1.5, **off}}, x)[:, 0, 0, 0, 0] * 255 / 64
    assert scipy.stats.kstest(factor, 'uniform', (0, 2.5)).pvalue > 1e-3
    rule = {'brightness': 0.2, 'brightness_rule': 'additive'}
    added = run({'jitter': {'prob': 1, **off, **rule}}, x)[:, 0, 0, 0, 0] - 64 / 255
    assert scipy.stats.kstest(added, 'uniform', (-0.2, 0.4)).pvalue > 1e-3


def test_jitter_hue_draws():
    x = np.zeros((3000, 1, 1, 1, 3), np.uint8)
    x[..., 0] = 255
    off = {'contrast': 0.0, 'saturation': 0.0, 'brightness': 0.0}
    y = run({'jitter': {'prob': 1, 'hue': 0.1, **off}}, x)[:, 0, 0, 0]
    turn = np.where(y[:, 1] > 0, y[:, 1], -y[:, 2]) / 6
    assert scipy.stats.kstest(turn, 'uniform', (-0.1, 0.2)).pvalue > 1e-3


def test_orders_are_equally_likely():
    draws = np.random.default_rng(0).random((24, 400, 4)).astype(np.float32)
    rank = jax.jit(color._ranks)
    ranks = np.asarray(rank(draws)).reshape(-1, 4)
    orders, counts = np.unique(ranks, axis=0, return_counts=True)
    assert {tuple(o) for o in orders.tolist()} == set(itertools.permutations(range(4)))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    tied = np.asarray(rank(np.zeros((24, 400, 4))))
    np.testing.assert_array_equal(tied[0, 0], np.arange(4))


@pytest.mark.parametrize('name', list(augment.ORDER))
def test_prob_is_the_frequency_in_each_view(name):
    x = np.random.default_rng(0).integers(1, 256, (600, 4, 4, 4, 3)).astype(np.uint8)
    options = {'blur': {'sigma': (1.0, 2.0)}}.get(name, {})
    done = changed({name: {'prob': (0.0, 0.3, 1.0, 0.3), **options}}, x)
    assert not done[:, 0].any()
    assert abs(done[:, 1].mean() - 0.3) < 4 * np.sqrt(0.21 / 600)
    assert done[:, 2].all()
    # Views of an image are drawn independently.
    assert abs(np.corrcoef(done[:, 1], done[:, 3])[0, 1]) < 4 / np.sqrt(600)


def test_same_key_same_result_and_each_image_its_own_draw():
    x = np.broadcast_to(batch(1, 1), (16, 2, S, S, 3))
    a, b, c = run(EVERYTHING, x), run(EVERYTHING, x), run(EVERYTHING, x, key=1)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max((2, 3, 4)).min() > 0.01
    flat = run({'jitter': {'prob': 1}}, x).reshape(32, -1)
    assert np.abs(flat[:, None] - flat[None]).max(-1)[~np.eye(32, dtype=bool)].min() > 0.01


def test_the_spec_decides_neither_order_nor_draws():
    x, key = batch(16), jax.random.key(0)
    specs = EVERYTHING, dict(reversed(EVERYTHING.items()))
    programs = [jax.make_jaxpr(compiled(s, 2, S, **UNIT))(key, x) for s in specs]
    assert str(programs[0]) == str(programs[1])
    alone, more = {'rotate90': {'prob': 0.5}}, {'grayscale': {'prob': 0}, 'cutout': {'prob': 0}}
    np.testing.assert_array_equal(run(alone, x), run(alone | more, x))


def test_order_of_operations():
    x = batch(4)
    y = run({'solarize': {'prob': 1}, 'grayscale': {'prob': 1}}, x)
    grey = run({'grayscale': {'prob': 1}}, x)
    np.testing.assert_allclose(y, np.where(grey >= 0.5, 1 - grey, grey), atol=1e-6)


def test_same_result_on_one_and_eight_devices():
    if len(jax.devices()) < 8:
        raise RuntimeError('this test needs the 8 CPU devices that conftest.py asks for')
    x = batch(16)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
    apply = compiled(EVERYTHING, 2, S, **UNIT)
    key = jax.random.key(3)
    with jax.set_mesh(mesh):
        y = apply(jax.device_put(key, NamedSharding(mesh, PartitionSpec())), sharded)
    assert y.sharding.is_equivalent_to(sharded.sharding, y.ndim)
    np.testing.assert_allclose(np.asarray(y), np.asarray(apply(key, x)), atol=1e-6)


# --- the whole


def test_nothing_named_is_normalisation():
    x = batch(3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    oracle = (x / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(augment.normalize(x, mean, std), oracle, atol=1e-6)
    np.testing.assert_allclose(run({}, x, mean=mean, std=std), oracle, atol=1e-6)
    none = {name: {'prob': 0} for name in augment.ORDER}
    np.testing.assert_allclose(run(none, x, mean=mean, std=std), oracle, atol=1e-6)
    assert augment.normalize(x, mean, std).dtype == jnp.float32


def test_values_stay_in_range():
    for key in range(5):
        y = run(EVERYTHING, batch(16, seed=key), key)
        assert y.dtype == np.float32
        assert np.all((y >= -1e-6) & (y <= 1 + 1e-6))


def test_a_config_dict_with_lists_is_a_spec():
    spec = ml_collections.ConfigDict({'blur': {'prob': (1.0, 0.0), 'sigma': [0.1, 2.0]}})
    assert changed(spec, batch(8)).tolist() == [[True, False]] * 8


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'blurr': {'prob': 1}}, r"config.inputs.augment: unknown augmentation 'blurr'. .*'blur'"),
        ({'jitter': {'prob': 1, 'hues': 1}}, r"augment.jitter: unknown key 'hues'.*'hue'"),
        ({'jitter': {}}, r"augment.jitter: key 'prob' is required"),
        (
            {'jitter': {'prob': 1, 'hue': 0.6}},
            r'jitter.hue: got 0.6; expected a number from 0 to 0.5',
        ),
        ({'jitter': {'prob': 1, 'contrast': -1}}, r'jitter.contrast: got -1; .* of at least 0'),
        ({'jitter': {'prob': 1, 'brightness_rule': 'add'}}, r"brightness_rule.*'additive'"),
        ({'blur': {'prob': 1.5}}, r'augment.blur.prob: got 1.5; expected a number from 0 to 1'),
        ({'blur': {'prob': (0.5, float('nan'))}}, r'blur.prob: got nan; '),
        ({'blur': {'prob': (0.5, 0.5, 0.5)}}, r'blur.prob: .* each of the 2 views'),
        ({'blur': {'prob': True}}, r'blur.prob: got True; '),
        ({'blur': {'prob': 1, 'sigma': (2, 1)}}, r'blur.sigma: .*not in ascending order'),
        ({'blur': {'prob': 1, 'sigma': (1, 2, 3)}}, r'blur.sigma: .*a pair'),
        ({'blur': {'prob': 1, 'kernel': 4}}, r'blur.kernel: expected an odd number'),
        ({'cutout': {'prob': 1, 'size': 2}}, r'cutout.size: got 2; expected a number from 0 to 1'),
        ({'noise': {'prob': 1, 'std': 'a'}}, r"noise.std: got 'a'; "),
        ({'solarize': {'prob': 1, 'threshold': 128}}, r'solarize.threshold: got 128; '),
        ({'sobel': 0.5}, r'augment.sobel: expected options such as'),
    ],
)
def test_errors_name_the_option(spec, message):
    with pytest.raises(UserError, match=message):
        augment.make(spec, views=2, image_size=S, **UNIT)


def test_errors_of_moments_and_views():
    with pytest.raises(UserError, match='mean: expected one number a channel'):
        augment.make({}, views=2, image_size=S, mean=(0.5,), std=(1, 1, 1))
    with pytest.raises(UserError, match='std: expected numbers above 0'):
        augment.normalize(batch(1), (0, 0, 0), (1, 1, 0))
    apply = augment.make({}, views=2, image_size=S, **UNIT)
    with pytest.raises(UserError, match=r'expected views uint8.*got uint8\[1, 3, 16, 16, 3\]'):
        apply(jax.random.key(0), {'views': jnp.asarray(batch(1, 3))})
    with pytest.raises(UserError, match='got float32'):
        apply(jax.random.key(0), {'views': jnp.asarray(batch(1), jnp.float32)})


def test_default_kernel_is_a_tenth_of_the_side():
    # 224 pixels, SimCLR's 23 taps: an impulse spreads over 11 pixels each way.
    x = np.zeros((1, 1, 224, 224, 3), np.uint8)
    x[:, :, 112, 112] = 255
    line = run({'blur': {'prob': 1, 'sigma': 2.0}}, x)[0, 0, 112, :, 0]
    np.testing.assert_array_equal(np.flatnonzero(line), np.arange(101, 124))
