"""SimSiam.

    python -m contrastive_jax.main --config=configs/simsiam.py --workdir=runs/simsiam

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {'name': 'simsiam', 'hidden': 256, 'projection': 256, 'predictor': 64}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2300)
    c.batch_size, c.optim.learning_rate = 32, 3e-3  # small batches, for more steps
    c.method = {'name': 'simsiam', 'hidden': 512, 'projection': 512, 'predictor': 128, 'layers': 2}


def cifar10(c: Config) -> None:
    """The paper's appendix D: 0.03 for a batch of 512, 800 epochs; 91.8 % linear, it says."""
    recipes.cifar10(c, epochs=800.0, batch=512)
    c.inputs.augment.jitter.update({'saturation': 0.4})
    c.inputs.crop.scale = (0.2, 1.0)
    c.method = {'name': 'simsiam', 'layers': 2}
    c.optim = {'name': 'sgd', 'learning_rate': 0.03, 'weight_decay': 5e-4}


def imagenet(c: Config) -> None:
    """The authors' command; there the predictor's rate stays at the peak."""
    recipes.imagenet(c, epochs=100.0, batch=512)
    recipes.moco_v2(c)
    c.method = {'name': 'simsiam'}
    c.optim = {'name': 'sgd', 'learning_rate': 0.05, 'weight_decay': 1e-4}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
