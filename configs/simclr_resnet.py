"""SimCLR with a ResNet.

    python -m contrastive_jax.main --config=configs/simclr_resnet.py --workdir=runs/resnet

Presets: the usual ones and `:flickr8k` (docs/presets.md).

Paper's code: the sum of NT-Xent over the two views; here: the mean, half of it, so half the decay
and, of biases and norms, twice the rate; all other steps of LARS are independent of that factor.
BatchNorm's statistics are the global batch's, as in the authors' code. Paper's code: contrast about
each channel's mean, saturation as HSV's; here: about the mean luma, and blended with the pixel's,
because all recipes share torchvision's.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

HALF_LOSS = {'weight_decay': 1e-4 / 2, 'bias_rate': 2.0}


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {'name': 'simclr', 'temperature': 0.3, 'hidden': 256, 'projection': 64}


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2800)
    c.method = {'name': 'simclr', 'temperature': 0.1, 'hidden': 512, 'projection': 128}


def flickr8k(c: Config) -> None:
    """The image encoder that `clip_vit.py:flickr8k` can start from, of the same 6,000 pictures."""
    cifar10_small(c)
    config_lib.dataset(c, 'captions')
    c.total_steps, c.model = 3000, recipes.FLICKR8K_RESNET
    c.inputs.update(size=48, view_size=0)
    c.evals, c.best = {'collapse': {}}, 'eval/collapse/rank'  # there are no classes


def cifar10(c: Config) -> None:
    """The authors' CIFAR-10 command (README of google-research/simclr): 91 % linear, they say."""
    recipes.cifar10(c, epochs=1000.0, batch=512)
    c.method = {'name': 'simclr', 'temperature': 0.5, 'layers': 3, 'hidden': 512}
    c.optim = {'name': 'lars', 'learning_rate': 1.0, 'warmup': 0.01, **HALF_LOSS}


def imagenet(c: Config) -> None:
    """The authors' ImageNet command for 100 epochs (tf2/run.py of google-research/simclr)."""
    recipes.imagenet(c, epochs=100.0, batch=4096)
    c.method = {'name': 'simclr', 'temperature': 0.1, 'layers': 3, 'hidden': 2048}
    c.optim = {'name': 'lars', 'learning_rate': 0.3, 'warmup': 0.1, **HALF_LOSS}


def folder(c: Config) -> None:
    """The ImageNet recipe at a batch that one GPU holds; there the authors scale by its root."""
    imagenet(c)
    recipes.folder(c)
    c.optim.learning_rate = 1.2  # 0.075 · √256, SimCLR appendix B.1


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, flickr8k, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
