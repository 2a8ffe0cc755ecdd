"""NNCLR.

    python -m contrastive_jax.main --config=configs/nnclr.py --workdir=runs/nnclr

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {
        'name': 'nnclr',
        'temperature': 0.2,
        'queue': 1024,
        'hidden': 256,
        'predictor': 256,
        'projection': 64,
    }


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2700)
    c.optim.learning_rate = 4e-3
    c.method = {
        'name': 'nnclr',
        'temperature': 0.1,
        'queue': 4096,
        'hidden': 512,
        'predictor': 512,
        'projection': 128,
    }


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe."""
    recipes.solo_learn(c, 0.4, 1e-5)
    c.method = {'name': 'nnclr', 'temperature': 0.2, 'queue': 65536}


def imagenet(c: Config) -> None:
    """The paper's appendix: LARS, 1000 epochs, SimCLR's optimiser with weaker decay."""
    recipes.imagenet(c, epochs=1000.0, batch=4096)
    recipes.asymmetric(c)
    c.method = {'name': 'nnclr'}
    c.optim = {'name': 'lars', 'learning_rate': 0.3, 'weight_decay': 1e-6, 'warmup': 0.01}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
