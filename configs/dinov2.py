"""DINOv2. Presets: the usual ones and `:large` (docs/presets.md).

python -m contrastive_jax.main --config=configs/dinov2.py --workdir=runs/dinov2
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

NARROW, LAST = {'name': 'dinov2', 'head_std': None}, ('head/last', 'patch_head/last')
OPTIM = {'name': 'adamw', 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup': 0.1}
OPTIM |= {'clip_norm': 3.0, 'clip_by': 'module', 'decayed': ('kernels', 'positions', 'tokens')}


def digits(c: Config) -> None:
    recipes.digits_vit(c, steps=700, pool='cls')
    recipes.multi_crop(c, scale=0.5, local=2, size=8, least=0.2)
    c.method = dict(**NARROW, prototypes=512, hidden=256, bottleneck=64, momentum=0.98)


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small_vit(c, steps=1200, pool='cls_mean')  # it has patches to mask
    recipes.multi_crop(c, scale=0.3, local=2, size=12, least=0.1)
    c.batch_size, c.inputs.view_size, c.model.width, c.model.patch = 32, 24, 96, 4
    c.method = NARROW | {'prototypes': 64, 'hidden': 512, 'bottleneck': 128, 'momentum': 0.97}
    c.method.update(teacher_temperature=(0.04, 0.04), patches=0.1, mask_prob=0.25)


def cifar10(c: Config) -> None:
    """The ImageNet recipe at CIFAR-10's size, two views and no local ones. Ours, not published."""
    recipes.cifar10(c, epochs=800.0, batch=512)
    recipes.asymmetric(c, blur=False)
    c.model = {'name': 'vit', 'size': 'Ti', 'patch': 4, 'pool': 'cls', 'dtype': 'bfloat16'}
    c.method = {'name': 'dinov2', 'prototypes': 4096, 'momentum': 0.996}
    c.optim = {**OPTIM, 'learning_rate': 5e-4}
    recipes.freeze(c, 1 / 100, *LAST)


def imagenet(c: Config) -> None:
    """ViT-L/16 for 100 "epochs" of 1250 steps (vitl16_short.yaml of the authors' code)."""
    recipes.imagenet_vit(c, epochs=0.0, batch=2048, size='L')
    recipes.dino_views(c, scale=0.32)
    c.total_steps, c.remat = 125_000, True
    c.model.update(position='learned', layer_scale=1e-5, drop_path=0.3, drop_path_uniform=True)
    c.method = {'name': 'dinov2', 'centring': 'centre', 'shared_head': True}
    c.optim = {**OPTIM, 'learning_rate': 0.004, 'scaling': 'sqrt', 'layer_decay': 0.9}
    c.optim.update(patch_embedding_rate=0.2, final_fraction=1e-6 / (0.004 * 2**0.5))
    recipes.freeze(c, 1 / 100, 'head/last')


def large(c: Config) -> None:
    """ViT-L/14 (vitl14.yaml). There ImageNet-22k and SwiGLU; here 1k and a GELU MLP as large."""
    imagenet(c)
    c.total_steps, c.batch_size, c.inputs.local_size = 625_000, 3072, 98
    c.model.update(patch=14, drop_path=0.4)
    heads = {'prototypes': 131_072, 'bottleneck': 384, 'patch_bottleneck': 256}
    c.method = {'name': 'dinov2', **heads, 'momentum': 0.994, 'sharpen': 30 / 500}
    c.optim.update(learning_rate=2e-4, final_fraction=1e-6 / (2e-4 * 3**0.5), warmup=80 / 500)
    c.optim.update(layer_decay=1.0, final_weight_decay=0.2)
    recipes.freeze(c, 1 / 500, *LAST)


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, large, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
