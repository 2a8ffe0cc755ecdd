"""Lab beside scikit-image, images in Lab, and encoders of some of its channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import color as peer

from contrastive_jax import models
from contrastive_jax.augment import lab
from contrastive_jax.config import UserError, build
from contrastive_jax.inputs import images
from contrastive_jax.inputs import lab as inputs

NIN = {'name': 'nin', 'blocks': 2, 'widths': (4, 4, 4), 'width': 6}


def grid(count=33):
    level = np.linspace(0, 1, count)
    return np.stack(np.meshgrid(level, level, level), -1).reshape(-1, 3)


@pytest.mark.parametrize('xp', [jnp, np])
def test_lab_is_scikit_images(xp):
    """All of 33³ colours, on the device in float32 and on the host in float64."""
    rgb, wanted = grid(), peer.rgb2lab(grid())
    if xp is jnp:
        found = jax.jit(lab.rgb_to_lab)(np.float32(rgb))
        back = jax.jit(lab.lab_to_rgb)(np.float32(wanted))
    else:
        found, back = lab.rgb_to_lab(rgb, np), lab.lab_to_rgb(wanted, np)
    np.testing.assert_allclose(found, wanted, atol=1e-3 if xp is jnp else 1e-9)
    np.testing.assert_allclose(back, rgb, atol=1e-4 if xp is jnp else 1e-9)


@pytest.mark.filterwarnings('ignore:Conversion from CIE-LAB')
def test_what_srgb_cannot_show_is_clipped_as_there():
    rng = np.random.default_rng(0)
    x = rng.uniform([0, -110, -110], [100, 110, 110], (10_000, 3))
    found = lab.lab_to_rgb(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, peer.lab2rgb(x), atol=1e-4)


def test_networks_see_about_one():
    x = lab.scaled(lab.rgb_to_lab(jnp.asarray(grid(9), jnp.float32)))
    assert -1 <= x[:, 0].min() < -0.999 < 0.999 < x[:, 0].max() <= 1.001
    assert 1.5 < np.abs(x[:, 1:]).max() < 2.2
    wanted = lab.rgb_to_lab(jnp.asarray(grid(9), jnp.float32))
    np.testing.assert_allclose(lab.unscaled(x), wanted, atol=1e-4)


class TestInputs:
    """The crops of `images`, in Lab."""

    record = {'image': np.random.default_rng(1).integers(0, 256, (20, 24, 3), np.uint8)}  # noqa: RUF012

    def made(self):
        options = {'size': 8, 'crop': {'scale': (0.5, 1.0)}}
        plain = images.make(**options, views=1, mean=(0,) * 3, std=(1,) * 3)
        return inputs.make(**options), plain

    def test_training_batches(self):
        ours, plain = self.made()
        rows = ours.train.host(self.record, np.random.default_rng(3))
        pixels = plain.train.host(self.record, np.random.default_rng(3))['views'][None]
        key = jax.random.key(0)
        batch = ours.train.device(key, {name: jnp.asarray(x)[None] for name, x in rows.items()})
        assert set(batch) == {'views', 'lab'}
        wanted = peer.rgb2lab(pixels / 255)
        np.testing.assert_allclose(batch['lab'], wanted, atol=1e-3)
        np.testing.assert_allclose(batch['views'], (wanted - [50, 0, 0]) / 50, atol=1e-4)

    def test_evaluation_and_fine_tuning_see_the_same(self):
        ours, _ = self.made()
        image = ours.eval.host(self.record, None)['image'][None]  # pyright: ignore
        wanted = (peer.rgb2lab(image / 255) - [50, 0, 0]) / 50
        found = ours.eval.device(None, {'image': jnp.asarray(image)})  # pyright: ignore
        np.testing.assert_allclose(found['image'], wanted, atol=1e-4)
        views = ours.tune.device(jax.random.key(0), {'views': jnp.asarray(image)[:, None]})
        np.testing.assert_allclose(views['views'][:, 0], wanted, atol=1e-4)
        assert set(views) == {'views'}
        assert ours.baseline(found).shape == (1, 8 * 8 * 3)

    def test_the_picture_is_in_rgb(self):
        ours, plain = self.made()
        rows = ours.train.host(self.record, np.random.default_rng(3))
        rows = {name: jnp.asarray(x)[None] for name, x in rows.items()}
        both = [i.show(i.train.device(jax.random.key(0), rows)) for i in (ours, plain)]
        assert both[0] == both[1]


class TestModel:
    def drawn(self, *sees):
        module = build('models', {'name': 'lab', 'sees': sees, 'encoder': NIN}, 'test')
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
        return module, x, models.init(module, jax.random.key(1), x)

    @pytest.mark.parametrize('train', [True, False])
    def test_parts_are_models_of_their_channels_one_behind_the_other(self, train):
        module, x, (params, stats) = self.drawn('L', 'ab')
        (features, named), after = models.apply(module, params, stats, x, train)
        plain = build('models', NIN, 'test')
        alone = {}
        for name, channels in (('L', x[..., :1]), ('ab', x[..., 1:])):
            alone[name] = models.apply(plain, params[name], stats[name], channels, train)
        wanted = [alone[name][0] for name in ('L', 'ab')]
        np.testing.assert_array_equal(features, np.concatenate([f for f, _ in wanted], 1))
        assert named.keys() == wanted[0][1].keys()
        for name, found in named.items():
            np.testing.assert_array_equal(found, np.concatenate([n[name] for _, n in wanted], -1))
        for name in ('L', 'ab'):
            jax.tree.map(np.testing.assert_array_equal, after[name], alone[name][1])

    def test_a_part_sees_nothing_else(self):
        module, x, (params, stats) = self.drawn('L')
        (features, _), _ = models.apply(module, params, stats, x, False)
        (same, _), _ = models.apply(module, params, stats, x.at[..., 1:].set(7), False)
        (other, _), _ = models.apply(module, params, stats, x.at[..., :1].set(7), False)
        np.testing.assert_array_equal(features, same)
        assert np.abs(features - other).max() > 1e-3

    def test_heads_of_attention_are_all_there(self):
        vit = {'name': 'vit', 'width': 8, 'depth': 1, 'heads': 2, 'patch': 4, 'cls_token': True}
        module = build('models', {'name': 'lab', 'sees': ('L', 'ab'), 'encoder': vit}, 'test')
        x = jnp.zeros((3, 8, 8, 3))
        params, stats = models.init(module, jax.random.key(0), x)
        (features, named), _ = models.apply(module, params, stats, x, False)
        assert features.shape == (3, 16)
        assert named['patches'].shape == (3, 4, 16)
        assert named['attention'].shape == (3, 4, 4)

    @pytest.mark.parametrize(
        ('sees', 'said'),
        [
            (('a',), r"sees: unknown channels 'a'.*'ab', 'Lab'"),
            ((), r'sees: got \(\); expected different ones'),
            (('L', 'L'), r"sees: got \('L', 'L'\); expected different ones"),
        ],
    )
    def test_mistakes_are_explained(self, sees, said):
        with pytest.raises(UserError, match=said):
            self.drawn(*sees)
        with pytest.raises(UserError, match=r"config\.model\.encoder: unknown key 'width_'"):
            build('models', {'name': 'lab', 'encoder': {**NIN, 'width_': 3}}, 'config.model')
