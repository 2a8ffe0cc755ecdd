"""Relative patch location: in which of eight directions one tile of an image lies from another.

    python -m contrastive_jax.main --config=configs/relative_patch.py --workdir=runs/patch

Presets: the usual ones (docs/presets.md). Tiles of digits that hold no ink tell nothing.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c, steps=250)
    c.inputs.crop.scale = (0.8, 1.0)
    # The 8 × 8 scans three times enlarged: tiles of 6 × 6 with a gap of 2.
    relative_patch(c, region=24, tile=6, jitter=1, hidden=256)
    c.model.stem, c.inputs.size = 'patch4', 24


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2800)
    c.inputs.crop.scale = (0.5, 1.0)
    # The paper's 96 and 48 pixels, a twelfth of them.
    relative_patch(c, region=32, tile=8, jitter=1, hidden=512)


def cifar10(c: Config) -> None:
    """Ours: we know of no published recipe for images of 32 pixels."""
    recipes.cifar10(c, epochs=200.0, batch=256)
    c.inputs.crop.scale = (0.5, 1.0)
    relative_patch(c, region=32, tile=8, jitter=1, hidden=1024)
    c.optim = {'name': 'sgd', 'learning_rate': 0.1, 'weight_decay': 5e-4, 'warmup': 0.05}


def imagenet(c: Config) -> None:
    """The paper's tiles and defences (cdoersch/deepcontext), with a ResNet-50 in AlexNet's place.

    Paper: images of 150,000 to 450,000 pixels and four grids in each; here: crops of half the image
    and more, resized to one grid. Paper: a third of the tiles are shown at down to 100 pixels and
    enlarged again; here: not. The optimiser is ours, because the paper's is for a sum.
    """
    recipes.imagenet(c, epochs=105.0, batch=256)
    recipes.torchvision(c)
    c.inputs.crop.update({'scale': (0.5, 1.0), 'flip': 0.0})
    relative_patch(c, region=432, tile=96, jitter=7, hidden=4096)
    c.optim = {'name': 'sgd', 'learning_rate': 0.1, 'weight_decay': 1e-4, 'warmup': 5 / 105}


def relative_patch(c: Config, region: int, tile: int, jitter: int, hidden: int) -> None:
    recipes.tiles(c, region, tile, jitter, colour='drop', augment={})
    c.method = {'name': 'relative_patch', 'hidden': hidden}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
