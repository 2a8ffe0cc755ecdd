"""MoCo v3.

    python -m contrastive_jax.main --config=configs/moco_v3.py --workdir=runs/moco_v3

Presets: the usual ones and `:imagenet_resnet` (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

RESNET = {'name': 'moco_v3', 'layers': 2, 'predictor_batch_norm': False}


def digits(c: Config) -> None:
    recipes.digits_vit(c)
    c.method = {'name': 'moco_v3', 'temperature': 0.3, 'hidden': 256, 'projection': 64}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2400)
    c.method = {'name': 'moco_v3', 'temperature': 0.2, 'hidden': 512, 'projection': 128}


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe."""
    recipes.solo_learn(c, 0.3, 1e-6)
    c.method = RESNET


def imagenet(c: Config) -> None:
    """ViT-S (CONFIG.md of the authors' code); 12 heads and random patch projection as there."""
    recipes.imagenet_vit(c, epochs=300.0, batch=4096)
    recipes.asymmetric(c)
    c.inputs.crop.interpolation = 'bilinear'
    c.model.update({'heads': 12, 'freeze_patch_embedding': True})
    c.method = {'name': 'moco_v3', 'temperature': 0.2}
    c.optim = {
        'name': 'adamw',
        'learning_rate': 1.5e-4,
        'weight_decay': 0.1,
        'warmup': 40 / 300,
        'decayed': recipes.EVERYTHING,
    }


def imagenet_resnet(c: Config) -> None:
    """ResNet-50 for 300 epochs (CONFIG.md of the authors' code)."""
    recipes.imagenet(c, epochs=300.0, batch=4096)
    recipes.asymmetric(c)
    c.inputs.crop.update({'scale': (0.2, 1.0), 'interpolation': 'bilinear'})
    c.method = {**RESNET, 'temperature': 1.0}
    recipes.torch_lars(c, 0.3, 1e-6, warmup=10 / 300)


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, imagenet_resnet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
