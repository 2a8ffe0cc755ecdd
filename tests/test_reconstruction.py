"""What is drawn of hidden pixels, and how far it is from the true ones."""

import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage import restoration
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
    apart = x[:, 0, 0] - x[:, 0, -1]
    assert found['mean_psnr'] == pytest.approx(db(apart), abs=1e-3)
    # Per cent of the greatest difference, as in the paper's table 1.
    assert found['l1'] == pytest.approx(ERROR, abs=1e-5)
    assert found['l2'] == pytest.approx(ERROR**2, abs=1e-5)
    assert found['mean_l1'] == pytest.approx(np.abs(apart).mean(), abs=1e-5)
    assert found['mean_l2'] == pytest.approx((apart**2).mean(), abs=1e-5)
    assert found['l1'].unit == found['mean_l2'].unit == '%'
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


def test_biharmonic_inpainting():
    """scikit-image's, whose solution of a surface that is biharmonic itself is that surface."""
    row, column = np.mgrid[:SIDE, :SIDE] / SIDE
    smooth = (0.2 + 0.3 * row * column + 0.2 * column**3)[None, :, :, None].repeat(3, 3)
    hidden = np.zeros((1, SIDE, SIDE, 1), bool)
    hidden[:, 8:20, 10:25] = True
    np.testing.assert_allclose(reconstruction.inpainted(smooth, hidden), smooth, atol=1e-6)
    # The encoder's images, where nothing but the left half is known.
    found = dict(reconstruction.make(count=3, records=10)(encoder()))
    x = pictures(20)[(2 * np.arange(10) + 1)] / 255
    hidden = np.broadcast_to(np.arange(SIDE)[None, None, :, None] >= SIDE // 2, (10, SIDE, SIDE, 1))
    filled = [
        restoration.inpaint_biharmonic(image, mask[..., 0], channel_axis=-1)
        for image, mask in zip(x, hidden, strict=True)
    ]
    apart = (np.stack(filled) - x)[:, :, SIDE // 2 :]
    assert found['biharmonic_psnr'] == pytest.approx(db(apart), abs=1e-3)
    assert found['biharmonic_l1'] == pytest.approx(np.abs(apart).mean(), abs=1e-5)
    assert found['biharmonic_l2'] == pytest.approx((apart**2).mean(), abs=1e-5)
    assert found['biharmonic_psnr'].title == 'biharmonic, PSNR'


def test_biharmonic_inpainting_of_a_few(monkeypatch):
    """Of as many as are asked for, and of no more than can be afforded."""
    titles = []
    for most, unknown in ((4, 2**19), (10, 3 * SIDE**2 // 2), (10, 1), (0, 1)):
        monkeypatch.setattr(reconstruction, 'UNKNOWN', unknown)
        found = dict(reconstruction.make(records=10, biharmonic=most)(encoder()))
        titles.append(getattr(found.get('biharmonic_psnr'), 'title', None))
    assert titles == [f'biharmonic, of {n} images, PSNR' for n in (4, 3, 1)] + [None]


def test_without_scikit_image_a_note_says_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setattr(reconstruction.importlib.util, 'find_spec', lambda name: None)
    with caplog.at_level(logging.INFO):
        found = dict(reconstruction.make(count=3, records=10)(encoder()))
    assert "pip install 'contrastive-jax[inpainting]'" in caplog.text
    assert {'psnr', 'l1', 'l2', 'mean_psnr', 'mean_l1', 'mean_l2', 'images'} == set(found)


def test_nothing_of_encoders_that_fill_nothing(caplog):
    with caplog.at_level(logging.INFO):
        assert not list(reconstruction.make()(encoder(names=('features',))))
        assert not list(reconstruction.make()(encoder(weights=None)))
    assert "gives no 'filled'" in caplog.text
    assert 'the baseline has none' in caplog.text


def test_mistakes_are_explained():
    with pytest.raises(UserError, match=r'evals\.reconstruction\.records: got 0'):
        reconstruction.make(records=0)
    with pytest.raises(UserError, match=r'evals\.reconstruction\.biharmonic: got -1'):
        reconstruction.make(biharmonic=-1)
