"""Context encoder: filling the hole in an image, against a critic.

    python -m contrastive_jax.main --config=configs/context_encoder.py --workdir=runs/holes

Presets: the usual ones and `:flickr8k` (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

HALF = (0.5,) * 3  # mean and std: images in [−1, 1], as the decoder's tanh


def holes(c: Config, least: float, mask: str, overlap: int, width: int = 64) -> None:
    """One crop an image, of at least this share; Adam as for DCGANs, at rates that stay."""
    c.inputs.update({'views': 1, 'view_size': 0, 'augment': {}, 'mean': HALF, 'std': HALF})
    c.inputs.crop.scale = (least, 1.0)
    c.method = {'name': 'context_encoder', 'mask': mask, 'overlap': overlap, 'width': width}
    adam = {'name': 'adamw', 'learning_rate': 8e-3, 'b1': 0.5, 'final_fraction': 1.0}
    c.optim = {**adam, 'modules': {'critic': {'learning_rate': 8e-4}}}  # 2e-3, 2e-4 for 64 images
    c.evals.reconstruction = {}


def digits(c: Config) -> None:
    recipes.digits(c, steps=1000)
    holes(c, 0.7, 'blocks', 1, width=32)
    c.evals.linear.outputs = ('features', 'stage*')


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=1000)
    holes(c, 0.5, 'blocks', 1, width=32)


def flickr8k(c: Config) -> None:
    """Flickr8k's photographs at 64 pixels, on two CPU cores."""
    cifar10_small(c)
    config_lib.dataset(c, 'captions')
    c.total_steps, c.inputs.size = 3000, 64
    c.model = {'name': 'dcgan', 'widths': (32, 64, 128, 256)}
    holes(c, 0.5, 'centre', 2, width=32)
    c.evals, c.best = {'reconstruction': {}}, 'eval/reconstruction/psnr'  # there are no classes


def cifar10(c: Config) -> None:
    """Ours: the authors' networks for images of 64 pixels."""
    recipes.cifar10(c, epochs=200.0, batch=64)
    c.model = {'name': 'dcgan', 'widths': (64, 128, 256, 512)}
    holes(c, 0.5, 'blocks', 1)


def imagenet(c: Config) -> None:
    """The authors' command; there 500 epochs, and crops are 128 pixels of images of 350."""
    recipes.imagenet(c, epochs=40.0, batch=64)
    c.inputs.update({'size': 128, 'crop_fraction': 128 / 350})
    holes(c, 0.1, 'centre', 4)
    c.inputs.crop.update({'scale': (0.1, 0.134), 'ratio': (1.0, 1.0), 'interpolation': 'bilinear'})
    c.model, c.method.bottleneck = {'name': 'dcgan'}, 4000


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c, batch=64)
    c.inputs.crop.scale = (0.1, 1.0)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, flickr8k, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
