"""SwAV.

    python -m contrastive_jax.main --config=configs/swav.py --workdir=runs/swav

Presets: the usual ones and `:imagenet_256` (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {
        'name': 'swav',
        'prototypes': 100,
        'queue': 512,
        'queue_from': 0.1,
        'frozen': 0.02,
        'hidden': 256,
        'projection': 64,
    }


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=1200)
    c.optim.learning_rate = 4e-3
    c.method = {'name': 'swav', 'prototypes': 128, 'queue': 0, 'frozen': 0.02, 'hidden': 512}


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe."""
    recipes.cifar10(c, epochs=1000.0, batch=256)
    c.method = {'name': 'swav', 'queue': 3840, 'queue_from': 0.015}
    recipes.solo_lars(c, 0.6, 1e-6)


def imagenet(c: Config) -> None:
    """The authors' 800 epochs (scripts/swav_800ep_pretrain.sh): 2 × 224 + 6 × 96 pixels."""
    recipes.imagenet(c, epochs=800.0, batch=4096)
    recipes.multi_crop(c, scale=0.14, local=6, size=96)
    c.inputs.std = (0.228, 0.224, 0.225)  # the authors'
    c.method = {'name': 'swav', 'frozen': 1 / 800}
    # 4.8 for a batch of 4096, and a thousandth of it at the end
    c.optim = {
        'name': 'lars',
        'learning_rate': 0.3,
        'weight_decay': 1e-6,
        'warmup': 10 / 800,
        'final_fraction': 0.001,
    }


def imagenet_256(c: Config) -> None:
    """Batches of 256, with a queue (scripts/swav_400ep_bs256_pretrain.sh)."""
    imagenet(c)
    c.total_epochs, c.batch_size = 400.0, 256
    c.method.update({'queue': 3840, 'queue_from': 15 / 400, 'frozen': 1 / 400})
    c.optim.update({'learning_rate': 0.6, 'warmup': 0.0})


def folder(c: Config) -> None:
    imagenet_256(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, imagenet_256, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
