"""PCL v2.

    python -m contrastive_jax.main --config=configs/pcl.py --workdir=runs/pcl

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

SMALL = {'name': 'pcl', 'momentum': 0.99, 'hidden': 512, 'projection': 128, 'iterations': 20}


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {
        **SMALL,
        'temperature': 0.2,
        'queue': 512,
        'clusters': (20, 40, 80),
        'warmup': 0.2,
    }


def cifar10_small(c: Config) -> None:
    """Four E-steps, after each epoch."""
    recipes.cifar10_small(c, steps=3500)
    c.method = {
        **SMALL,
        'temperature': 0.1,
        'queue': 1024,
        'clusters': (250, 500, 1000),
        'warmup': 0.0,
        'batch_norm': True,
    }


def cifar10(c: Config) -> None:
    """MoCo's CIFAR-10 notebook with the ImageNet recipe's ratio of images to clusters."""
    recipes.cifar10(c, epochs=200.0, batch=512)
    recipes.torchvision(c)
    c.method = {
        'name': 'pcl',
        'temperature': 0.1,
        'momentum': 0.99,
        'queue': 4096,
        'clusters': (1000, 2000, 4000),
        'negatives': 0,
    }
    recipes.torch_sgd(c, 0.03, 5e-4)


def imagenet(c: Config) -> None:
    """The authors' command (README and main_pcl.py of salesforce/PCL)."""
    recipes.imagenet(c, epochs=200.0, batch=256)
    recipes.torchvision(c)
    recipes.moco_v2(c)
    c.method = {'name': 'pcl'}
    recipes.torch_sgd(c, 0.03, 1e-4)


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
