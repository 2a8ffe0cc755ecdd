"""Supervised classification, what self-supervised methods are compared with.

    python -m contrastive_jax.main --config=configs/supervised.py --workdir=runs/supervised

Presets: the usual ones (docs/presets.md). Your own images need `--config.method.classes`. From
another run's encoder, `--config.init_from=RUN`, this is fine-tuning with all labels.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c, steps=500)
    c.inputs.views = 1
    classifier(c, 10)


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=4300)
    c.inputs.views = 1
    classifier(c, 10)


def cifar10(c: Config) -> None:
    """The cross-entropy of SupCon's authors (main_ce.py of their code): ResNet-50, 95.0 %."""
    recipes.cifar10(c, epochs=500.0, batch=1024)
    recipes.torchvision(c)
    c.inputs.views, c.inputs.augment, c.inputs.crop.scale = 1, {}, (0.2, 1.0)
    c.inputs.std, c.model.size = recipes.CIFAR10_STD, 50
    classifier(c, 10)
    recipes.torch_sgd(c, 0.2, 1e-4)  # 0.8 for a batch of 1024
    c.optim.update({'warmup': 10 / 500, 'initial_fraction': 0.01 / 0.8, 'final_fraction': 1e-3})


def imagenet(c: Config) -> None:
    """ResNet-50 in an hour (Goyal et al. 2017, arXiv:1706.02677, section 5.1): 76.3 %.

    Paper: BatchNorm over a GPU's 32 images; here: over the global batch, because results do not
    depend on devices.
    """
    recipes.imagenet(c, epochs=90.0, batch=8192)
    c.inputs.views, c.inputs.augment = 1, {}
    classifier(c, 1000)
    c.method.head_std = 0.01
    # From 0.1 to 3.2.
    c.optim = {'name': 'sgd', 'learning_rate': 0.1, 'weight_decay': 1e-4, 'nesterov': True}
    c.optim.update({'warmup': 5 / 90, 'initial_fraction': 0.1 / 3.2})
    c.optim.update({'milestones': (30 / 90, 60 / 90, 80 / 90)})


def classifier(c: Config, classes: int) -> None:
    c.method = {'name': 'supervised', 'classes': classes}
    c.evals.classifier = {}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
