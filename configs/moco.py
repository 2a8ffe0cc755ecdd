"""MoCo v1 and v2.

    python -m contrastive_jax.main --config=configs/moco.py --workdir=runs/moco

Presets: the usual ones and `:imagenet_v1` (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

SMALL = {'name': 'moco', 'momentum': 0.99, 'hidden': 512, 'projection': 128}


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {**SMALL, 'temperature': 0.2, 'queue': 1024}


def cifar10_small(c: Config) -> None:
    """Without BatchNorm in the head, kNN was the untrained encoder's after 400 steps."""
    recipes.cifar10_small(c, steps=2350)
    c.method = {**SMALL, 'temperature': 0.1, 'queue': 1024, 'batch_norm': True, 'symmetric': True}


def cifar10(c: Config) -> None:
    """The authors' CIFAR-10 notebook, symmetric: 85.3 % kNN after 200 epochs, they say."""
    recipes.cifar10(c, epochs=200.0, batch=512)
    recipes.torchvision(c)
    c.inputs.std = recipes.CIFAR10_STD
    c.method = {
        'name': 'moco',
        'temperature': 0.1,
        'momentum': 0.99,
        'queue': 4096,
        'layers': 1,
        'symmetric': True,
    }
    recipes.torch_sgd(c, 0.03, 5e-4)  # 0.06 for a batch of 512


def imagenet(c: Config) -> None:
    """MoCo v2 (README of the authors' code)."""
    recipes.imagenet(c, epochs=200.0, batch=256)
    recipes.torchvision(c)
    recipes.moco_v2(c)
    c.method = {'name': 'moco', 'temperature': 0.2}
    recipes.torch_sgd(c, 0.03, 1e-4)


def imagenet_v1(c: Config) -> None:
    """MoCo v1. Paper: greyscale before the jitter; here: after it, as in all recipes."""
    recipes.imagenet(c, epochs=200.0, batch=256)
    recipes.torchvision(c)
    c.inputs.crop.scale = (0.2, 1.0)
    jitter = {'prob': 1.0, 'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.4}
    c.inputs.augment = {'jitter': jitter, 'grayscale': {'prob': 0.2}}
    c.method = {'name': 'moco', 'temperature': 0.07, 'layers': 1}
    recipes.torch_sgd(c, 0.03, 1e-4)
    c.optim.milestones = (120 / 200, 160 / 200)


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, imagenet_v1, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
