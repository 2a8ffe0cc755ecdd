"""VICReg.

    python -m contrastive_jax.main --config=configs/vicreg.py --workdir=runs/vicreg

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {'name': 'vicreg', 'hidden': 512, 'projection': 512}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2700)
    c.method = {'name': 'vicreg', 'hidden': 512, 'projection': 512}


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe."""
    recipes.solo_learn(c, 0.3, 1e-4)
    c.inputs.crop.scale = (0.2, 1.0)
    c.inputs.augment.solarize = {'prob': 0.1}
    c.method = {'name': 'vicreg', 'hidden': 2048, 'projection': 2048}


def imagenet(c: Config) -> None:
    """The authors' command for 1000 epochs (README of facebookresearch/vicreg)."""
    recipes.imagenet(c, epochs=1000.0, batch=2048)
    recipes.asymmetric(c)
    c.method = {'name': 'vicreg'}
    recipes.torch_lars(c, 0.2, 1e-6, warmup=0.01)
    c.optim.final_fraction = 0.001


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
