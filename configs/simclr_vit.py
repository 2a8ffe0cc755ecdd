"""SimCLR with a ViT.

    python -m contrastive_jax.main --config=configs/simclr_vit.py --workdir=runs/first

Presets: the usual ones (docs/presets.md). The authors have none with a ViT.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits_vit(c)
    c.method = {'name': 'simclr', 'temperature': 0.3, 'hidden': 256, 'projection': 64}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small_vit(c, steps=1100)
    c.method = {'name': 'simclr', 'temperature': 0.1, 'hidden': 512, 'projection': 128}


def cifar10(c: Config) -> None:
    """Augmentation and temperature of SimCLR's CIFAR-10 command; the rest as ViTs want it."""
    recipes.cifar10(c, epochs=800.0, batch=512)
    c.model = {'name': 'vit', 'size': 'S', 'patch': 4, 'pool': 'mean', 'dtype': 'bfloat16'}
    c.method = {'name': 'simclr', 'temperature': 0.5, 'hidden': 2048, 'projection': 128}
    c.optim = {'name': 'adamw', 'learning_rate': 5e-4, 'weight_decay': 0.1, 'warmup': 0.05}


def imagenet(c: Config) -> None:
    """Optimiser and encoder of MoCo v3's ViT-S (CONFIG.md of its code); SimCLR's views and loss."""
    recipes.imagenet_vit(c, epochs=300.0, batch=4096)
    c.method = {
        'name': 'simclr',
        'temperature': 0.2,
        'layers': 3,
        'hidden': 4096,
        'projection': 256,
    }
    c.optim = {'name': 'adamw', 'learning_rate': 1.5e-4, 'weight_decay': 0.1, 'warmup': 40 / 300}


def folder(c: Config) -> None:
    """The ImageNet recipe at a batch that one GPU holds."""
    imagenet(c)
    recipes.folder(c)
    c.total_epochs = 100.0
    c.optim.update({'learning_rate': 5e-4, 'warmup': 0.1})


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
