"""Jigsaw puzzles: by which of many permutations an image's tiles were shuffled.

    python -m contrastive_jax.main --config=configs/jigsaw.py --workdir=runs/jigsaw

Presets: the usual ones (docs/presets.md). Tiles of digits that hold no ink tell nothing.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c, steps=250)
    c.inputs.crop.scale = (0.8, 1.0)
    # The 8 × 8 scans three times enlarged: tiles of 6 × 6 with a gap of 2.
    jigsaw(c, region=24, tile=6, jitter=1, permutations=50, width=64, hidden=256, orders=4)
    c.model.stem, c.inputs.size = 'patch4', 24


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=3800)
    c.inputs.crop.scale = (0.5, 1.0)
    jigsaw(c, region=32, tile=8, jitter=1, permutations=100, width=128, hidden=512, orders=4)


def cifar10(c: Config) -> None:
    """Ours: we know of no published recipe for images of 32 pixels."""
    recipes.cifar10(c, epochs=200.0, batch=256)
    c.inputs.crop.scale = (0.5, 1.0)
    jigsaw(c, region=32, tile=8, jitter=1, permutations=100, width=256, hidden=1024)
    c.optim = {'name': 'sgd', 'learning_rate': 0.1, 'weight_decay': 5e-4, 'warmup': 0.05}


def imagenet(c: Config) -> None:
    """VISSL's ResNet-50 (jigsaw_8gpu_resnet.yaml): 2,000 permutations, a linear layer behind them.

    VISSL: the shorter side resized to 256, then a square of 255, two thirds of which are grey;
    here: crops of 0.8 of the image and more, two thirds of the tiles grey. VISSL: tiles are not
    normalised; here as in the paper. VISSL: biases decay; here not. Its permutations are others.
    """
    recipes.vissl(c)
    c.inputs.crop.scale = (0.8, 1.0)
    jigsaw(c, region=255, tile=64, jitter=10, permutations=2000, width=1000, layers=1)
    c.inputs.augment = {'grayscale': {'prob': 0.66}}
    c.optim.update({'warmup': 5 / 105, 'initial_fraction': 0.25})


def jigsaw(c: Config, region: int, tile: int, jitter: int, **method: int) -> None:
    recipes.tiles(c, region, tile, jitter, colour='keep', augment={'grayscale': {'prob': 0.3}})
    c.method = {'name': 'jigsaw', **method}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
