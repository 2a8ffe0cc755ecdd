"""BYOL.

    python -m contrastive_jax.main --config=configs/byol.py --workdir=runs/byol

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {'name': 'byol', 'momentum': 0.98, 'hidden': 256, 'projection': 64}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2350)
    c.optim.learning_rate = 4e-3
    c.method = {'name': 'byol', 'momentum': 0.95, 'hidden': 512, 'projection': 128}


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe."""
    recipes.solo_learn(c, 1.0, 1e-5)
    c.method = {'name': 'byol', 'momentum': 0.99}


def imagenet(c: Config) -> None:
    """The authors' recipe for 300 epochs (byol/configs/byol.py of deepmind-research).

    Paper's code: contrast about each channel's mean, saturation as HSV's; here: about the mean
    luma, and blended with the pixel's, because all recipes share torchvision's.
    """
    recipes.imagenet(c, epochs=300.0, batch=4096)
    recipes.asymmetric(c)
    c.inputs.augment.jitter.brightness_rule = 'additive'
    c.method = {'name': 'byol', 'momentum': 0.99}
    recipes.torch_lars(c, 0.3, 1e-6, warmup=10 / 300)


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
