"""SimCLR with a ViT.

    python -m contrastive_jax.main --config=configs/simclr_vit.py --workdir=runs/first

| preset | data | made for |
|---|---|---|
| `:digits` (the default) | scikit-learn's handwritten digits, embedded | 2 CPU cores, 3 minutes |
| `:cifar10_small` | CIFAR-10 | 2 CPU cores, 7 minutes |
| `:cifar10` | CIFAR-10 through TFDS | one GPU |
| `:imagenet` | ImageNet through TFDS | a TPU or GPU slice |
| `:folder` | your pictures: `--config.data.root=DIR` | one GPU |

CIFAR-10 as a folder: `--config.data.source=folder --config.data.root=DIR`, which holds
`{train,test}/<class>/*.png`.
"""

from contrastive_jax import config as config_lib
from contrastive_jax.config import Config

# SimCLR, appendix A: strength 1 for ImageNet, 0.5 and no blur for CIFAR-10.
JITTER = {'prob': 0.8, 'brightness': 0.8, 'contrast': 0.8, 'saturation': 0.8, 'hue': 0.2}
HALF_JITTER = {'prob': 0.8, 'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1}


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
    c.model = {'name': 'vit', 'width': 96, 'depth': 4, 'heads': 3, 'patch': 4, 'pool': 'mean'}
    c.method = {'name': 'simclr', 'temperature': 0.3, 'hidden': 256, 'projection': 64}
    c.optim = {'name': 'adamw', 'learning_rate': 8e-3, 'weight_decay': 0.05, 'warmup': 0.1}
    c.evals = {'knn': {'k': 20, 'temperature': 0.07}, 'linear': {}}


def cifar10_small(c: Config) -> None:
    """For few steps: small batches, crops not too small, colours that keep more of themselves."""
    config_lib.dataset(c, 'cifar10')
    c.total_steps, c.batch_size = 1100, 64
    c.log_every, c.checkpoint_every = 100, 500
    c.data.crop.scale = (0.2, 1.0)
    jitter = {**HALF_JITTER, 'saturation': 0.2, 'hue': 0.05}
    c.augment = {'jitter': jitter, 'grayscale': {'prob': 0.2}}
    c.model = {'name': 'vit', 'width': 192, 'depth': 4, 'heads': 3, 'patch': 8, 'pool': 'mean'}
    c.method = {'name': 'simclr', 'temperature': 0.1, 'hidden': 512, 'projection': 128}
    c.optim = {'name': 'adamw', 'learning_rate': 4e-3, 'weight_decay': 0.05, 'warmup': 0.05}
    c.evals = {'knn': {'k': 200, 'temperature': 0.1}, 'linear': {}}


def cifar10(c: Config) -> None:
    """Augmentation and temperature of SimCLR's CIFAR-10 command; the rest as ViTs want it."""
    config_lib.dataset(c, 'cifar10')
    c.total_epochs, c.batch_size = 800.0, 512
    c.eval_every = 10_000
    c.augment = {'jitter': HALF_JITTER, 'grayscale': {'prob': 0.2}}
    c.model = {'name': 'vit', 'size': 'S', 'patch': 4, 'pool': 'mean', 'dtype': 'bfloat16'}
    c.method = {'name': 'simclr', 'temperature': 0.5, 'hidden': 2048, 'projection': 128}
    c.optim = {'name': 'adamw', 'learning_rate': 5e-4, 'weight_decay': 0.1, 'warmup': 0.05}
    c.evals = {'knn': {'k': 200, 'temperature': 0.1}, 'linear': {}}


def imagenet(c: Config) -> None:
    """Optimiser and encoder of MoCo v3's ViT-S (CONFIG.md of its code); SimCLR's views and loss."""
    config_lib.dataset(c, 'imagenet')
    c.total_epochs, c.batch_size = 300.0, 4096
    c.eval_every = 10_000
    c.augment = {
        'jitter': JITTER,
        'grayscale': {'prob': 0.2},
        'blur': {'prob': 0.5, 'sigma': (0.1, 2.0)},
    }
    c.model = {'name': 'vit', 'size': 'S', 'patch': 16, 'pool': 'cls', 'dtype': 'bfloat16'}
    c.method = {
        'name': 'simclr',
        'temperature': 0.2,
        'layers': 3,
        'hidden': 4096,
        'projection': 256,
    }
    c.optim = {'name': 'adamw', 'learning_rate': 1.5e-4, 'weight_decay': 0.1, 'warmup': 40 / 300}
    c.evals = {'knn': {'k': 20, 'temperature': 0.07}, 'linear': {}}


def folder(c: Config) -> None:
    """The ImageNet recipe at a batch that one GPU holds."""
    imagenet(c)
    config_lib.dataset(c, 'folder')
    c.total_epochs, c.batch_size = 100.0, 256
    c.eval_every = 0
    c.optim.learning_rate = 5e-4
    c.optim.warmup = 0.1


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
