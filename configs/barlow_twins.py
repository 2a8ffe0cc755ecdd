"""Barlow Twins.

    python -m contrastive_jax.main --config=configs/barlow_twins.py --workdir=runs/barlow_twins

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {'name': 'barlow_twins', 'hidden': 512, 'projection': 512}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=1150)
    c.optim.learning_rate = 4e-3
    c.method = {'name': 'barlow_twins', 'hidden': 512, 'projection': 512}


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe."""
    recipes.cifar10(c, epochs=1000.0, batch=256)
    recipes.asymmetric(c)
    del c.inputs.augment.blur
    c.method = {'name': 'barlow_twins', 'scale': 0.1, 'hidden': 2048, 'projection': 2048}
    recipes.solo_lars(c, 0.3, 1e-4)


def imagenet(c: Config) -> None:
    """The authors' command; there biases and norms have a rate of their own, 0.0048."""
    recipes.imagenet(c, epochs=1000.0, batch=2048)
    recipes.asymmetric(c)
    c.method = {'name': 'barlow_twins', 'scale': 0.024}
    c.optim = {
        'name': 'lars',
        'learning_rate': 0.2,
        'weight_decay': 1e-6,
        'warmup': 0.01,
        'final_fraction': 0.001,
    }


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
