"""I-JEPA.

    python -m contrastive_jax.main --config=configs/ijepa.py --workdir=runs/ijepa

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

EXACT = {'activation': 'gelu', 'start': 'mae'}  # the authors' activation; the start nearest theirs
LARGE = {'name': 'ijepa', 'activation': 'gelu', 'dtype': 'bfloat16'}
OPTIM = {'name': 'adamw', 'learning_rate': 1e-3 * 256 / 2048, 'warmup': 40 / 300}
OPTIM |= {'initial_fraction': 0.2, 'final_fraction': 1e-3}
OPTIM |= {'weight_decay': 0.04, 'final_weight_decay': 0.4}
OPTIM |= {'decayed': ('kernels', 'tokens')}  # what has more than one dimension


def views(c: Config, least: float) -> None:
    """One crop an image, of at least this share; no flip, no colours are changed."""
    c.inputs.views, c.inputs.augment = 1, {}
    c.inputs.crop.update({'scale': (least, 1.0), 'flip': 0.0})


def digits(c: Config) -> None:
    recipes.digits_vit(c, steps=1000)
    views(c, least=0.5)
    c.model.update({'patch': 2, 'start': 'mae'})
    c.method = {'name': 'ijepa', 'width': 48, 'depth': 2, 'heads': 2}
    c.optim.learning_rate = 2e-3  # 8e-3 and a faster teacher: below untrained


def cifar10_small(c: Config) -> None:
    """Not tuned."""
    recipes.cifar10_small_vit(c, steps=1900)
    views(c, least=0.3)
    c.model.update({'patch': 4, 'start': 'mae'})
    c.method = {'name': 'ijepa', 'width': 96, 'depth': 2, 'heads': 3}
    c.optim.learning_rate = 2e-3


def cifar10(c: Config) -> None:
    """The ImageNet recipe with ViT-S at MAE's length; nobody published one for CIFAR-10."""
    recipes.cifar10(c, epochs=1000.0, batch=256)
    views(c, least=0.3)
    c.model = {'name': 'vit', 'size': 'S', 'patch': 4, 'pool': 'mean', 'dtype': 'bfloat16', **EXACT}
    c.method = {**LARGE, 'width': 192, 'depth': 6, 'heads': 6}
    c.optim = {**OPTIM, 'warmup': 40 / 1000}


def imagenet(c: Config) -> None:
    """ViT-H/14 for 300 epochs (configs/in1k_vith14_ep300.yaml of the authors' code)."""
    recipes.imagenet(c, epochs=300.0, batch=2048)
    views(c, least=0.3)
    c.inputs.crop.interpolation = 'bilinear'
    c.model = {'name': 'vit', 'width': 1280, 'depth': 32, 'heads': 16, 'patch': 14, 'pool': 'mean'}
    c.model.update({'dtype': 'bfloat16', **EXACT})
    c.method = LARGE
    c.optim = OPTIM


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
