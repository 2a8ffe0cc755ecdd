"""What is drawn of hidden pixels, and how far it is from the true ones."""

import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from subjects import of_images, subject

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.evals import reconstruction
from contrastive_jax.evaluation.subject import Weights

TOWER = Weights(models.Microbatched(None, 1), {}, {})  # pyright: ignore[reportArgumentType]
SIDE, ERROR = 32, 0.2  # a whole number of grey levels


def pictures(count, seed=0):
    """The left half of each has one colour, the right one another."""
    colours = np.random.default_rng(seed).integers(40, 200, (count, 1, 2, 3), dtype=np.uint8)
    return np.broadcast_to(np.repeat(colours, SIDE // 2, 2), (count, SIDE, SIDE, 3)).copy()


def encoder(devices=1, names=('features', 'filled', 'hidden'), **more):
    """Hides the right half, and fills it with what is there, brighter by ERROR in [0, 1]."""
    inputs = of_images(None, size=SIDE, mean=(0.3, 0.5, 0.7), std=(0.2, 0.25, 0.5))

    def encode(batch, name):
        x = inputs.eval.device(None, batch)['image']
        hidden = jnp.broadcast_to(jnp.arange(SIDE)[None, None, :, None] >= SIDE // 2, x.shape)
        brighter = x + ERROR / jnp.asarray([0.2, 0.25, 0.5])[None, None, None]
        outputs = {
            'features': x.mean((1, 2)),
            'filled': jnp.where(hidden, brighter, x),
            'hidden': hidden[..., :1].astype(jnp.float32),
        }
        return {name: outputs[name] for name in names}[name]

    images = pictures(20)
    splits = {s: (images, np.zeros(20)) for s in ('train', 'test')}
    found = subject(
        *(splits, jax.jit(encode, static_argnums=1)),
        **{'devices': devices, 'batch': 16, 'weights': TOWER, **more},
    )
    found.inputs = inputs
    return found


def db(errors):
    return -10 * np.log10(np.mean(np.square(errors)))


@pytest.mark.parametrize('devices', [1, 8])
def test_psnr_and_pictures(devices):
    found = dict(reconstruction.make(count=3, records=10)(encoder(devices)))
    assert found['psnr'] == pytest.approx(db([ERROR]), abs=1e-3)
    assert found['psnr'].unit == 'dB'
    # The mean of what is seen is the colour of the left half.
    rows = (2 * np.arange(10) + 1) * 20 // 20
    x = pictures(20)[rows] / 255
    assert found['mean_psnr'] == pytest.approx(db(x[:, 0, 0] - x[:, 0, -1]), abs=1e-3)
    sheet = np.asarray(Image.open(io.BytesIO(found['images'])).convert('RGB'))
    seen = {tuple(c) for c in sheet.reshape(-1, 3)}
    for i in (1, 5, 8):  # of the ten
        left, right = np.int64(255 * x[i, 0, 0] + 0.5), 255 * x[i, 0, -1]
        assert tuple(left) in seen
        assert tuple(np.round(right).astype(int)) in seen
        assert tuple(np.round(right + 255 * ERROR).astype(int)) in seen
    assert (128, 128, 128) in seen
    other = dict(reconstruction.make(count=3, records=10)(encoder(9 - devices)))
    assert other['images'] == found['images']


def test_nothing_of_encoders_that_fill_nothing(caplog):
    with caplog.at_level(logging.INFO):
        assert not list(reconstruction.make()(encoder(names=('features',))))
        assert not list(reconstruction.make()(encoder(weights=None)))
    assert "gives no 'filled'" in caplog.text
    assert 'the baseline has none' in caplog.text


def test_mistakes_are_explained():
    with pytest.raises(UserError, match=r'evals\.reconstruction\.records: got 0'):
        reconstruction.make(records=0)
