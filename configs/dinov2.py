"""DINOv2.

    python -m contrastive_jax.main --config=configs/dinov2.py --workdir=runs/dinov2

Presets: the usual ones (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

# The decay rises from the one to the other.
DECAY = {'weight_decay': 0.04, 'final_weight_decay': 0.4}


def digits(c: Config) -> None:
    recipes.digits_vit(c, steps=700, pool='cls')
    recipes.multi_crop(c, scale=0.5, local=2, size=8)
    c.inputs.local_scale = (0.2, 0.5)
    head = {'prototypes': 512, 'hidden': 256, 'bottleneck': 64}
    c.method = {'name': 'dinov2', **head, 'momentum': 0.98}


def cifar10_small(c: Config) -> None:
    """With the small ViT: it has patches to mask."""
    recipes.cifar10_small_vit(c, steps=650, pool='cls')
    head = {'prototypes': 256, 'hidden': 512, 'bottleneck': 128}
    c.method = {'name': 'dinov2', **head, 'momentum': 0.95}


def cifar10(c: Config) -> None:
    """The ImageNet recipe at CIFAR-10's size, two views and no local ones. Ours, not published."""
    recipes.cifar10(c, epochs=800.0, batch=512)
    recipes.asymmetric(c)
    del c.inputs.augment.blur
    c.model = {'name': 'vit', 'size': 'Ti', 'patch': 4, 'pool': 'cls', 'dtype': 'bfloat16'}
    c.method = {'name': 'dinov2', 'prototypes': 4096, 'momentum': 0.996}
    c.optim = {'name': 'adamw', 'learning_rate': 5e-4, **DECAY, 'warmup': 0.1, 'clip_norm': 3.0}


def imagenet(c: Config) -> None:
    """ViT-L/16 for 100 "epochs" of 1250 steps (vitl16_short.yaml of the authors' code)."""
    recipes.imagenet_vit(c, epochs=0.0, batch=2048, size='L')
    recipes.asymmetric(c)
    c.total_steps = 125_000
    c.inputs.augment.blur.prob, c.inputs.augment.solarize.prob = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)
    recipes.multi_crop(c, scale=0.32, local=8, size=96)
    c.model.update({'position': 'learned', 'drop_path': 0.3, 'layer_scale': 1e-5})
    c.remat = True
    c.method = {'name': 'dinov2'}
    c.optim = {
        'name': 'adamw',
        'learning_rate': 0.004,
        'scaling': 'sqrt',
        'layer_decay': 0.9,
        **DECAY,
        'warmup': 0.1,
        'final_fraction': 1e-6 / 0.004,
        'clip_norm': 3.0,
    }


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
