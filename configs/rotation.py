"""RotNet: predicting by how many quarter turns an image was rotated.

    python -m contrastive_jax.main --config=configs/rotation.py --workdir=runs/rotation

Presets: the usual ones (docs/presets.md). It suits images that have an up: of the digits 0, 1 and 8
look the same after half a turn, and 6 and 9 are each other's, so that not all turns can be found.
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits(c, steps=300)  # of four turns an image
    c.inputs.crop.scale = (0.7, 1.0)
    rotation(c)


def cifar10_small(c: Config) -> None:
    recipes.cifar10_small(c, steps=1600)
    rotation(c)


def cifar10(c: Config) -> None:
    """The authors' CIFAR-10 recipe (gidariss/FeatureLearningRotNet); block 2 gives 89.06 %.

    That is what three fully connected layers reach on its maps. Authors' code: the classifier
    begins as torch's Linear; here: from 0.
    """
    recipes.cifar10(c, epochs=200.0, batch=128)
    c.inputs.crop = {'pad': 4, 'flip': 0.5, 'interpolation': 'bicubic'}
    c.inputs.mean = tuple(x / 255 for x in (125.3, 123.0, 113.9))
    c.inputs.std = tuple(x / 255 for x in (63.0, 62.1, 66.7))
    c.model = {'name': 'nin'}
    recipes.torch_sgd(c, 0.2, 5e-4)  # 0.1 for a batch of 128
    c.optim.update({'nesterov': True, 'milestones': (0.3, 0.6, 0.8), 'milestone_factor': 0.2})
    rotation(c)


def imagenet(c: Config) -> None:
    """VISSL's ResNet-50 (rotnet_8gpu_resnet.yaml).

    VISSL: one turn an image, drawn at random, and the classifier's bias decays; here: all four, as
    in the paper, and it does not.
    """
    recipes.vissl(c)
    rotation(c)


def rotation(c: Config) -> None:
    """One view an image; evaluators look at the task itself, and of small images at every depth."""
    c.inputs.views, c.inputs.augment, c.method = 1, {}, {'name': 'rotation'}
    c.evals.pretext = {}
    if c.data.source == 'digits' or c.model.name == 'nin':
        c.evals.linear.outputs = ('features', 'stage*', 'block*')


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, cifar10_small, cifar10, imagenet, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
