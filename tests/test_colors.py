"""How near colours are to the true ones, and what is drawn of them."""

import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage import color as peer
from subjects import given, subject

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.evals import colors
from contrastive_jax.evaluation.subject import Weights

TOWER = Weights(models.Microbatched(None, 1), {}, {})  # pyright: ignore[reportArgumentType]
SIDE, SAID = 32, (30.0, -20.0)


def pictures(count, seed=0):
    """Two colours each, of which the left one fills three quarters."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 1, 2, 3), dtype=np.uint8)
    wide = np.repeat(colours, (3 * SIDE // 4, SIDE // 4), axis=2)
    return np.broadcast_to(wide, (count, SIDE, SIDE, 3)).copy()


def encoder(devices=1, names=('features', 'ab'), **more):
    """Gives one colour to every pixel."""

    def encode(batch, name):
        x = batch['image'].astype(jnp.float32)
        ab = jnp.broadcast_to(jnp.asarray(SAID).reshape(1, 1, 1, 2), (*x.shape[:3], 2))
        return {n: y for n, y in {'features': x.mean((1, 2)), 'ab': ab}.items() if n in names}[name]

    splits = {name: (pictures(20, i), np.zeros(20)) for i, name in enumerate(('train', 'test'))}
    found = subject(
        *(splits, jax.jit(encode, static_argnums=1)),
        **{'devices': devices, 'batch': 16, 'weights': TOWER, **more},
    )
    found.inputs = given((SIDE, SIDE, 3), np.uint8)
    return found


def curve(ab, true):
    """The area as the authors have it: shares below 0, 1, ..., 150, by the trapezium rule."""
    error = np.sqrt(((ab - true) ** 2).sum(-1)).ravel()
    thresholds = np.linspace(0, 150, 15_001)
    shares = np.searchsorted(np.sort(error), thresholds, side='right') / len(error)
    return np.trapezoid(shares, thresholds) / 150


@pytest.mark.parametrize('devices', [1, 8])
def test_areas_and_pictures(devices):
    found = dict(colors.make(count=3, records=10)(encoder(devices)))
    rows = (2 * np.arange(10) + 1) * 20 // 20
    test = peer.rgb2lab(pictures(20, 1)[rows])[..., 1:]
    sepia = peer.rgb2lab(pictures(20, 0)[rows])[..., 1:].mean((0, 1, 2))
    for name, answer in (('', SAID), ('grey_', (0, 0)), ('sepia_', sepia)):
        assert found[f'{name}auc'] == pytest.approx(curve(np.asarray(answer), test), abs=1e-4)
        assert found[f'{name}auc'].unit == found[f'{name}balanced_auc'].unit == '%'
        # Every square that occurs counts alike, whatever its pixels' number.
        squares = {}
        for ab in test.reshape(-1, 2):
            squares.setdefault(tuple(np.round(ab / 10)), []).append(ab)
        areas = [curve(np.asarray(answer), np.stack(of)) for of in squares.values()]
        assert found[f'{name}balanced_auc'] == pytest.approx(np.mean(areas), abs=1e-4)
    assert found['chroma'] == pytest.approx(np.hypot(*SAID) / np.hypot(*test.T).mean(), abs=1e-4)
    sheet = np.asarray(Image.open(io.BytesIO(found['images'])).convert('RGB'))
    seen = {tuple(c) for c in sheet.reshape(-1, 3)}
    for i in (1, 5, 8):  # of the ten
        true = pictures(20, 1)[rows[i], 0, 0]
        assert tuple(true) in seen
        light = [peer.rgb2lab(true[None])[0, 0], 0, 0]
        grey = np.round(255 * peer.lab2rgb(np.float64([light]))[0]).astype(int)
        assert tuple(grey) in seen
    other = dict(colors.make(count=3, records=10)(encoder(9 - devices)))
    assert other['images'] == found['images']


def test_true_colours_are_perfect_and_far_ones_worth_nothing():
    true = np.random.default_rng(0).uniform(-50, 50, (2, 3, 3, 2))
    assert colors.auc(true, true) == (1, 1)
    assert colors.auc(true + 200, true) == (0, 0)


def test_nothing_of_encoders_that_give_no_colours(caplog):
    with caplog.at_level(logging.INFO):
        assert not list(colors.make()(encoder(names=('features',))))
        assert not list(colors.make()(encoder(weights=None)))
    assert "gives no 'ab'" in caplog.text
    assert 'the baseline has none' in caplog.text


def test_mistakes_are_explained():
    with pytest.raises(UserError, match=r'evals\.colors\.count: got 0'):
        colors.make(count=0)
