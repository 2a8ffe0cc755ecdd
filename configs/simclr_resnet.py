"""SimCLR with a ResNet.

    python -m contrastive_jax.main --config=configs/simclr_resnet.py --workdir=runs/resnet

| preset | data | made for |
|---|---|---|
| `:digits` (the default) | scikit-learn's handwritten digits, embedded | 2 CPU cores, 3 minutes |
| `:cifar10_small` | CIFAR-10 | 2 CPU cores, 7 minutes |
| `:cifar10` | CIFAR-10 through TFDS; the authors' ResNet-18 | one GPU |
| `:imagenet` | ImageNet through TFDS; the paper's ResNet-50 | a TPU or GPU slice |
| `:folder` | your pictures: `--config.data.root=DIR` | one GPU |

CIFAR-10 as a folder: `--config.data.source=folder --config.data.root=DIR`, which holds
`{train,test}/<class>/*.png`.

Our NT-Xent is the mean over all views, half of the sum that the authors' code takes; LARS makes
the step independent of that factor but for the weight decay, which counts twice here.
BatchNorm's statistics are the global batch's, as in the authors' code.
"""

from contrastive_jax import config as config_lib
from contrastive_jax.config import Config

# SimCLR, appendix A: strength 1 for ImageNet, 0.5 and no blur for CIFAR-10.
JITTER = {'prob': 0.8, 'brightness': 0.8, 'contrast': 0.8, 'saturation': 0.8, 'hue': 0.2}
HALF_JITTER = {'prob': 0.8, 'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1}
# 4 × 4 patches, then two blocks: 0.7 M parameters, most of whose work are large matrix products.
# Blocks that start as the identity learn too slowly for so few steps.
SMALL = {
    'name': 'resnet',
    'stem': 'patch',
    'widths': (96, 192),
    'blocks': (1, 1),
    'zero_init_last': False,
}


def digits(c: Config) -> None:
    config_lib.dataset(c, 'digits')
    c.total_steps, c.batch_size = 1000, 64
    c.log_every, c.checkpoint_every = 100, 500
    # No flips: a mirrored 2 is no digit.
    c.data.crop = {'scale': (0.5, 1.0), 'interpolation': 'bicubic', 'flip': 0.0}
    c.augment = {
        'jitter': {'prob': 0.8, 'brightness': 0.2, 'contrast': 0.4},
        'cutout': {'prob': 0.5},
    }
    c.model = SMALL
    c.method = {'name': 'simclr', 'temperature': 0.3, 'hidden': 256, 'projection': 64}
    c.optim = {'name': 'adamw', 'learning_rate': 8e-3, 'weight_decay': 0.05, 'warmup': 0.1}
    c.evals = {'knn': {'k': 20, 'temperature': 0.07}, 'linear': {}}


def cifar10_small(c: Config) -> None:
    """For few steps: small batches, crops not too small, colours that keep more of themselves."""
    config_lib.dataset(c, 'cifar10')
    c.total_steps, c.batch_size = 1850, 64
    c.log_every, c.checkpoint_every = 100, 500
    c.data.crop.scale = (0.2, 1.0)
    jitter = {**HALF_JITTER, 'saturation': 0.2, 'hue': 0.05}
    c.augment = {'jitter': jitter, 'grayscale': {'prob': 0.2}}
    c.model = SMALL
    c.method = {'name': 'simclr', 'temperature': 0.1, 'hidden': 512, 'projection': 128}
    c.optim = {'name': 'adamw', 'learning_rate': 8e-3, 'weight_decay': 0.05, 'warmup': 0.05}
    c.evals = {'knn': {'k': 200, 'temperature': 0.1}, 'linear': {}}


def cifar10(c: Config) -> None:
    """The authors' CIFAR-10 command (README of google-research/simclr): 91 % linear, they say."""
    config_lib.dataset(c, 'cifar10')
    c.total_epochs, c.batch_size = 1000.0, 512
    c.eval_every = 10_000
    c.augment = {'jitter': HALF_JITTER, 'grayscale': {'prob': 0.2}}
    c.model = {'name': 'resnet', 'size': 18, 'stem': 'cifar'}
    c.method = {'name': 'simclr', 'temperature': 0.5, 'layers': 3, 'hidden': 512}
    c.optim = {'name': 'lars', 'learning_rate': 1.0, 'weight_decay': 1e-4, 'warmup': 0.01}
    c.evals = {'knn': {'k': 200, 'temperature': 0.1}, 'linear': {}}


def imagenet(c: Config) -> None:
    """The authors' ImageNet command for 100 epochs (tf2/run.py of google-research/simclr)."""
    config_lib.dataset(c, 'imagenet')
    c.total_epochs, c.batch_size = 100.0, 4096
    c.eval_every = 10_000
    c.augment = {
        'jitter': JITTER,
        'grayscale': {'prob': 0.2},
        'blur': {'prob': 0.5, 'sigma': (0.1, 2.0)},
    }
    c.model = {'name': 'resnet', 'size': 50, 'stem': 'imagenet', 'dtype': 'bfloat16'}
    c.method = {'name': 'simclr', 'temperature': 0.1, 'layers': 3, 'hidden': 2048}
    c.optim = {'name': 'lars', 'learning_rate': 0.3, 'weight_decay': 1e-4, 'warmup': 0.1}
    c.evals = {'knn': {'k': 20, 'temperature': 0.07}, 'linear': {}}


def folder(c: Config) -> None:
    """The ImageNet recipe at a batch that one GPU holds; there the authors scale by its root."""
    imagenet(c)
    config_lib.dataset(c, 'folder')
    c.batch_size, c.eval_every = 256, 0
    c.optim.learning_rate = 1.2  # 0.075 · √256, SimCLR appendix B.1


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
