"""Metric learning with labels: triplet, max-margin and N-pair losses.

    python -m contrastive_jax.main --config=configs/metric_learning.py --workdir=runs/metric

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

# FaceNet's
TRIPLET = {
    'name': 'metric_learning',
    'loss': 'triplet',
    'options': {'margin': 0.2, 'mining': 'semi_hard', 'distance': 'squared_euclidean'},
}


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {**TRIPLET, 'projection': 64}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2750)
    c.method = TRIPLET


def cifar10(c: Config) -> None:
    """FaceNet's loss with SimCLR's views; ours, not published."""
    recipes.cifar10(c, epochs=200.0, batch=512)
    c.method = TRIPLET
    c.optim = {'name': 'sgd', 'learning_rate': 0.03, 'weight_decay': 5e-4, 'warmup': 0.05}


def imagenet(c: Config) -> None:
    """The same for ImageNet; ours, not published."""
    recipes.imagenet(c, epochs=100.0, batch=1024)
    c.method = TRIPLET
    c.optim = {'name': 'sgd', 'learning_rate': 0.1, 'weight_decay': 1e-4, 'warmup': 0.05}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
