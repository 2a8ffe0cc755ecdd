"""MAE.

    python -m contrastive_jax.main --config=configs/mae.py --workdir=runs/mae

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

SMALL = {'name': 'mae', 'width': 64, 'depth': 2, 'heads': 2}
EXACT = {'activation': 'gelu', 'start': 'mae'}  # as the authors' code
OPTIM = {'name': 'adamw', 'weight_decay': 0.05, 'b2': 0.95}


def views(c: Config, least: float) -> None:
    """One crop an image, of at least this share, and a flip; no colours are changed."""
    c.inputs.views, c.inputs.augment, c.inputs.crop.scale = 1, {}, (least, 1.0)


def digits(c: Config) -> None:
    recipes.digits_vit(c, steps=1000)
    c.model.update({'patch': 2, 'cls_token': True, 'start': 'mae'})
    c.inputs.views, c.inputs.augment = 1, {}
    c.method = SMALL
    c.optim.update({'learning_rate': 8e-3, 'b2': 0.95})
    c.evals.reconstruction = {}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small_vit(c, steps=2100)
    c.model.update({'width': 96, 'patch': 4, 'cls_token': True, 'start': 'mae'})
    c.inputs.views, c.inputs.augment = 1, {}
    c.method = SMALL
    c.optim.learning_rate = 6e-3
    c.evals.reconstruction = {}


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe; there the decoder's norms have an epsilon of 1e-5."""
    recipes.cifar10(c, epochs=1000.0, batch=256)
    views(c, least=0.08)
    c.model = {'name': 'vit', 'size': 'S', 'heads': 12, 'patch': 4, 'dtype': 'bfloat16', **EXACT}
    c.method = {'name': 'mae', 'activation': 'gelu', 'dtype': 'bfloat16'}
    c.optim = {**OPTIM, 'learning_rate': 2e-4, 'warmup': 10 / 1000, 'initial_fraction': 0.15}
    c.optim.update({'decayed': recipes.EVERYTHING})
    c.evals.reconstruction = {}


def imagenet(c: Config) -> None:
    """ViT-L/16 for 800 epochs, the authors' own choice (PRETRAIN.md of their code)."""
    recipes.imagenet_vit(c, epochs=800.0, batch=4096, size='L')
    views(c, least=0.2)
    c.model.update(EXACT)
    c.method = {'name': 'mae', 'activation': 'gelu', 'dtype': 'bfloat16'}
    c.optim = {**OPTIM, 'learning_rate': 1.5e-4, 'warmup': 40 / 800}
    c.optim.update({'decayed': ('kernels', 'tokens')})  # what has more than one dimension
    c.evals.reconstruction = {}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
