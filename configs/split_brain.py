"""Split-brain autoencoder: colours from lightness, and lightness from colours.

    python -m contrastive_jax.main --config=configs/split_brain.py --workdir=runs/split

Presets: the usual ones and `:flickr8k` (docs/presets.md). Each part has half of the width that the
encoder of other methods has. `"--config.model.sees=('L',)"` leaves one half alone, a control.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def split(c: Config, **method: object) -> None:
    """Two encoders of half the width; how well either predicts what the other sees."""
    recipes.lab(c, ('L', 'ab'))
    widths = c.model.encoder.get('widths', (64, 128, 256, 512))  # of ResNet-18 to 101
    c.model.encoder.widths = tuple(w // 2 for w in widths)
    c.method = {'name': 'split_brain', **method}
    c.evals.pretext = {}


def digits(c: Config) -> None:
    recipes.photographs(c, steps=700)
    split(c, width=64)


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=1500)
    split(c, width=64)


def flickr8k(c: Config) -> None:
    """Flickr8k's photographs at 64 pixels, in 20 minutes of two CPU cores."""
    recipes.photographs_64(c, steps=3000)
    split(c, width=128)
    c.best = 'eval/pretext/accuracy'


def cifar10(c: Config) -> None:
    recipes.cifar10(c, epochs=200.0, batch=256)
    c.optim = {'name': 'adamw', 'learning_rate': 1e-3, 'b2': 0.99, 'weight_decay': 0.01}
    split(c)


def imagenet(c: Config) -> None:
    """Colorization's recipe: of the authors' own (richzhang/splitbrainauto) the models are public.

    Paper: halves of an AlexNet, crops of 180 pixels; here: of a ResNet-50, of 192 pixels.
    """
    recipes.caffe_colours(c)
    split(c)


def folder(c: Config) -> None:
    imagenet(c)
    recipes.own_colours(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, flickr8k, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
