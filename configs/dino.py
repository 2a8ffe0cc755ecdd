"""DINO.

    python -m contrastive_jax.main --config=configs/dino.py --workdir=runs/dino

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

# Runs of minutes are too short for a teacher whose temperature rises; and their head is narrow.
SHORT = {'name': 'dino', 'teacher_temperature': (0.04, 0.04), 'head_std': None}


def digits(c: Config) -> None:
    recipes.digits_vit(c, steps=800, pool='cls')
    recipes.multi_crop(c, scale=0.5, local=2, size=8, least=0.2)
    head = {'prototypes': 512, 'hidden': 256, 'bottleneck': 64}
    c.method = {**SHORT, **head, 'momentum': 0.98}
    recipes.freeze(c, 0.01, 'head/last')


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=5000)
    c.batch_size, c.optim.learning_rate = 32, 3e-3  # small batches, for more steps
    head = {'prototypes': 256, 'hidden': 512, 'bottleneck': 128, 'batch_norm': True}
    c.method = {**SHORT, **head, 'momentum': 0.97}
    recipes.freeze(c, 0.01, 'head/last')


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe: two views, no local ones."""
    recipes.solo_learn(c, 0.3, 1e-6)
    c.method = {'name': 'dino', 'prototypes': 4096, 'momentum': 0.9995}
    c.method['teacher_temperature'] = (0.07, 0.07)
    recipes.freeze(c, 1 / 1000, 'head/last')


def imagenet(c: Config) -> None:
    """ViT-S/16 for 300 epochs, the best command of the authors' README (76.0 % linear)."""
    recipes.imagenet_vit(c, epochs=300.0, batch=1024)
    recipes.dino_views(c, scale=0.4)
    c.model.update({'position': 'learned', 'drop_path': 0.1})
    c.method = {'name': 'dino', 'sharpen': 30 / 300, 'learn_length': True}
    c.optim = {
        'name': 'adamw',
        'learning_rate': 5e-4,
        'weight_decay': 0.04,
        'final_weight_decay': 0.4,
        'decayed': ('kernels', 'positions', 'tokens'),
        'warmup': 10 / 300,
        'final_fraction': 1e-6 / 2e-3,
        'clip_norm': 3.0,
        'clip_by': 'tensor',
    }
    recipes.freeze(c, 1 / 300, 'head/last')


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
