"""LeJEPA.

    python -m contrastive_jax.main --config=configs/lejepa.py --workdir=runs/lejepa

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

SMALL = {'name': 'lejepa', 'directions': 256, 'embedding': 0, 'hidden': 256, 'projection': 32}


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = SMALL


def cifar10_small(c: Config) -> None:
    """Not tuned."""
    recipes.cifar10_small(c, steps=1900)
    c.method = {**SMALL, 'hidden': 512, 'projection': 64}


def cifar10(c: Config) -> None:
    """The authors' optimiser for ResNets and four views; nobody published one for CIFAR-10."""
    recipes.cifar10(c, epochs=800.0, batch=256)
    c.inputs.views = 4
    c.model.zero_init_last = False
    c.method = {'name': 'lejepa', 'embedding': 0, 'projection': 64}
    optim(c, weight_decay=5e-4, epochs=800)


def imagenet(c: Config) -> None:
    """ViT-L/14 for 100 epochs (README and scripts/launch_epps_ablation.md of the authors' code).

    The script also averages the encoder of the views' mean, which the paper does not need, and
    hides patches, in a way that is not published; here: neither.
    """
    recipes.imagenet_vit(c, epochs=100.0, batch=512, size='L')
    recipes.multi_crop(c, scale=0.3, local=6, size=98)
    c.inputs.crop.interpolation = 'bilinear'
    c.inputs.augment.update({'jitter': recipes.BYOL_JITTER, 'solarize': {'prob': 0.2}})
    c.model.update({'patch': 14, 'position': 'learned', 'activation': 'gelu', 'drop_path': 0.1})
    c.method = {'name': 'lejepa'}
    optim(c, weight_decay=0.05, epochs=100)


def optim(c: Config, weight_decay: float, epochs: int) -> None:
    """AdamW at 5e-4 for any batch, as torch's; one epoch of warm-up, as MINIMAL.md has it."""
    c.optim = {
        'name': 'adamw',
        'learning_rate': 5e-4 * 256 / c.batch_size,
        'weight_decay': weight_decay,
        'decayed': recipes.EVERYTHING,
        'warmup': 1 / epochs,
        'initial_fraction': 0.01,
        'final_fraction': 0.001,
    }


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
