"""SwAV.

    python -m contrastive_jax.main --config=configs/swav.py --workdir=runs/swav

Presets: the usual ones and `:imagenet_256` (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c)
    c.method = {'name': 'swav', 'prototypes': 100, 'hidden': 256, 'projection': 64}
    c.method.update({'queue': 512, 'queue_from': 0.1})
    recipes.freeze(c, 0.02, 'prototypes')


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=2700)
    c.optim.learning_rate = 4e-3
    c.method = {'name': 'swav', 'prototypes': 128, 'hidden': 512}
    recipes.freeze(c, 0.02, 'prototypes')


def cifar10(c: Config) -> None:
    """solo-learn's CIFAR-10 recipe. There the queue fills from step 0 on and counts, with zeros,
    from epoch 50 on; here as in the authors' code. There prototypes' lengths are learned."""
    recipes.solo_learn(c, 0.6, 1e-6)
    recipes.simclr_views(c)
    c.method = {'name': 'swav', 'queue': 3840, 'queue_from': 50 / 1000}
    recipes.freeze(c, 2 / 1000, 'prototypes')


def imagenet(c: Config) -> None:
    """The authors' 800 epochs (scripts/swav_800ep_pretrain.sh): 2 × 224 + 6 × 96 pixels."""
    recipes.imagenet(c, epochs=800.0, batch=4096)
    recipes.multi_crop(c, scale=0.14, local=6, size=96)
    c.inputs.std, c.inputs.crop.interpolation = (0.228, 0.224, 0.225), 'bilinear'  # the authors'
    c.model.zero_init_last = False
    c.method = {'name': 'swav'}
    # From 0.3 to 4.8 for a batch of 4096, and a thousandth of it at the end. LARC: every parameter.
    recipes.torch_lars(c, 0.3, 1e-6, warmup=10 / 800)
    c.optim.update(initial_fraction=0.3 / 4.8, final_fraction=0.001)
    c.optim.update(decayed=('kernels', 'vectors'))
    recipes.freeze(c, 1 / 800, 'prototypes')


def imagenet_256(c: Config) -> None:
    """Batches of 256, with a queue (scripts/swav_400ep_bs256_pretrain.sh)."""
    imagenet(c)
    c.total_epochs, c.batch_size = 400.0, 256
    c.method.update({'queue': 3840, 'queue_from': 15 / 400})
    c.optim.update({'learning_rate': 0.6, 'warmup': 0.0})
    recipes.freeze(c, 1 / 400, 'prototypes')


def folder(c: Config) -> None:
    imagenet_256(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, imagenet_256, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
