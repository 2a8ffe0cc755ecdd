"""SupCon: SimCLR with labels.

    python -m contrastive_jax.main --config=configs/sup_con.py --workdir=runs/sup_con

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {'name': 'sup_con', 'temperature': 0.1, 'hidden': 256, 'projection': 64}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2750)
    c.method = {'name': 'sup_con', 'temperature': 0.1, 'hidden': 512}


def cifar10(c: Config) -> None:
    """The authors' command (README of SupContrast); their loss is τ / 0.07 times ours, hence the
    rate, which is 0.5 for a batch of 1024, and the decay."""
    recipes.cifar10(c, epochs=1000.0, batch=1024)
    recipes.torchvision(c)
    c.inputs.std = recipes.CIFAR10_STD
    c.inputs.crop.scale = (0.2, 1.0)
    c.model.size = 50
    c.method = {'name': 'sup_con', 'temperature': 0.1}
    recipes.torch_sgd(c, 0.5 / 4 * 0.1 / 0.07, 1e-4 * 0.07 / 0.1)
    c.optim.update({'warmup': 0.01, 'initial_fraction': 0.01 / 0.5, 'final_fraction': 0.001})


def imagenet(c: Config) -> None:
    """Paper's code (google-research/supcon): AutoAugment, batch 6144, rate 0.4, decay 1e-3, a head
    of one layer on unit features; here: SimCLR's views and optimiser and the paper's head, because
    this project has no AutoAugment, which those numbers are tuned for."""
    recipes.imagenet(c, epochs=350.0, batch=4096)
    c.method = {'name': 'sup_con', 'temperature': 0.1}
    c.optim = {'name': 'lars', 'learning_rate': 0.3, 'weight_decay': 1e-4, 'warmup': 10 / 350}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
