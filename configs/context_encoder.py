"""Context encoder: filling the hole in an image, against a critic.

    python -m contrastive_jax.main --config=configs/context_encoder.py --workdir=runs/holes

Presets: the usual ones and `:flickr8k` (docs/presets.md). The decoder ends in tanh, so images are
seen in [−1, 1]. The critic learns at a tenth of the others' rate, as in the authors' code.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

WHOLE = {'augment': {}, 'view_size': 0, 'mean': (0.5,) * 3, 'std': (0.5,) * 3}


def holes(c: Config, rate: float, **method: object) -> None:
    """One view an image, no colours changed; Adam as for DCGANs, at a rate that stays."""
    c.inputs.views = 1
    c.inputs.update(WHOLE)
    c.method = {'name': 'context_encoder', **method}
    # Rates are for 256 images.
    rate = rate * 256 / c.batch_size
    c.optim = {'name': 'adamw', 'learning_rate': rate, 'b1': 0.5, 'final_fraction': 1.0}
    c.optim.modules = {'critic': {'learning_rate': rate / 10}}
    c.evals.reconstruction = {}


def digits(c: Config) -> None:
    recipes.digits(c, steps=1000)
    c.inputs.crop.scale = (0.7, 1.0)
    holes(c, 2e-3, overlap=1, width=32, critic_width=32)


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=1000)
    holes(c, 2e-3, overlap=2, width=32, critic_width=32)


def flickr8k(c: Config) -> None:
    """Flickr8k's photographs at 64 pixels, in 20 minutes of two CPU cores."""
    cifar10_small(c)
    config_lib.dataset(c, 'captions')
    c.total_steps, c.inputs.size = 3000, 64
    c.inputs.crop.scale = (0.5, 1.0)
    c.model = {'name': 'dcgan', 'widths': (32, 64, 128, 256)}
    holes(c, 2e-3, width=32, critic_width=32)
    c.evals = {'reconstruction': {}, 'collapse': {}}  # there are no classes
    c.best = 'eval/reconstruction/psnr'


def cifar10(c: Config) -> None:
    recipes.cifar10(c, epochs=200.0, batch=64)
    c.inputs.crop.scale = (0.5, 1.0)
    c.model = {'name': 'dcgan', 'widths': (64, 128, 256, 512)}
    holes(c, 2e-3, overlap=2)


def imagenet(c: Config) -> None:
    """The authors' command (README of pathak22/context-encoder).

    Authors: crops of 128 pixels of images whose shorter side has 350, 500 epochs of their images;
    here: square crops of about that share, 40 epochs of ImageNet's 1.28 million.
    """
    recipes.imagenet(c, epochs=40.0, batch=64)
    c.inputs.size, c.inputs.crop_fraction = 128, 128 / 350
    c.inputs.crop = {'scale': (0.1, 0.134), 'ratio': (1.0, 1.0), 'interpolation': 'bilinear'}
    c.model = {'name': 'dcgan'}
    holes(c, 2e-3, bottleneck=4000)


def folder(c: Config) -> None:
    """The same on one's own images, of which crops show more."""
    imagenet(c)
    recipes.folder(c, batch=64)
    c.inputs.crop.scale, c.inputs.crop_fraction = (0.5, 1.0), 1.0


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, flickr8k, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
