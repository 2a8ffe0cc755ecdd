"""Colorization: which colours a grey image has.

    python -m contrastive_jax.main --config=configs/colorization.py --workdir=runs/colours

Presets: the usual ones and `:flickr8k` (docs/presets.md). Digits have no colour: `:digits` has
digits on photographs. Where images are grey there is nothing to learn.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def coloured(c: Config, **method: object) -> None:
    """The lightness of one view an image; how well colours are found, at every depth."""
    recipes.lab(c, ('L',))
    c.method = {'name': 'colorization', **method}
    c.evals.update({'pretext': {}, 'colors': {}})


def digits(c: Config) -> None:
    recipes.photographs(c, steps=700)
    coloured(c, width=64)


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=1500)
    coloured(c, width=64)


def flickr8k(c: Config) -> None:
    """Flickr8k's photographs at 64 pixels, in 20 minutes of two CPU cores."""
    recipes.photographs_64(c, steps=3000)
    coloured(c, width=128)


def cifar10(c: Config) -> None:
    recipes.cifar10(c, epochs=200.0, batch=256)
    c.optim = {'name': 'adamw', 'learning_rate': 1e-3, 'b2': 0.99, 'weight_decay': 0.01}
    coloured(c)


def imagenet(c: Config) -> None:
    recipes.caffe_colours(c)
    coloured(c)


def folder(c: Config) -> None:
    imagenet(c)
    recipes.own_colours(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, flickr8k, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
