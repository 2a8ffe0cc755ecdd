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
    recipes.cifar10_small(c, steps=6000)
    c.batch_size, c.optim.learning_rate = 32, 6e-3  # small batches, for more steps
    c.method = {'name': 'simsiam', 'hidden': 512, 'projection': 512, 'predictor': 128, 'layers': 2}


def cifar10(c: Config) -> None:
    """The paper's appendix D: base rate 0.03, batch 512, 800 epochs; 91.8 % linear, it says."""
    recipes.cifar10(c, epochs=800.0, batch=512)
    c.inputs.crop.update({'scale': (0.2, 1.0), 'interpolation': 'bilinear'})
    c.method = {'name': 'simsiam', 'layers': 2}
    recipes.torch_sgd(c, 0.03, 5e-4)


def imagenet(c: Config) -> None:
    """The authors' command (README of facebookresearch/simsiam)."""
    recipes.imagenet(c, epochs=100.0, batch=512)
    recipes.moco_v2(c)
    c.method = {'name': 'simsiam'}
    recipes.torch_sgd(c, 0.05, 1e-4)
    c.optim.modules = {'predictor': {'final_fraction': 1.0}}  # --fix-pred-lr


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
