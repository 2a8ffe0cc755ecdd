"""Parts of recipes that several methods share: data, views, encoder and evaluators.

A file of `configs/` calls one of these and then sets what is its method's own.
"""

from typing import Any

from contrastive_jax import config as config_lib
from contrastive_jax.config import Config

# Kinds of parameters that weight decay takes where the authors leave it to torch, and OpenCLIP's.
EVERYTHING = ('kernels', 'embeddings', 'positions', 'tokens', 'vectors')
TABLES_TOO = ('kernels', 'embeddings', 'positions')
# Of MoCo's notebook and SupContrast: the mean of the images' own ones, not that of all pixels.
CIFAR10_STD = (0.2023, 0.1994, 0.2010)
# SimCLR, appendix A: strength 1 for ImageNet, 0.5 and no blur for CIFAR-10.
JITTER = {'prob': 0.8, 'brightness': 0.8, 'contrast': 0.8, 'saturation': 0.8, 'hue': 0.2}
HALF_JITTER = {'prob': 0.8, 'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.4, 'hue': 0.1}
# BYOL, appendix B, table 6; MoCo v3, Barlow Twins, VICReg and DINO use it, too.
BYOL_JITTER = {'prob': 0.8, 'brightness': 0.4, 'contrast': 0.4, 'saturation': 0.2, 'hue': 0.1}
# 4 × 4 patches, then two blocks: 0.7 M parameters, most of whose work are large matrix products.
# Blocks that start as the identity learn too slowly for so few steps.
SMALL_RESNET = {
    'name': 'resnet',
    'stem': 'patch',
    'widths': (96, 192),
    'blocks': (1, 1),
    'zero_init_last': False,
}
# A finer map in narrower layers takes as long as that one on images of 32 pixels.
CIFAR_RESNET = {**SMALL_RESNET, 'stem': 'patch4', 'widths': (32, 64, 128), 'blocks': (1, 1, 1)}
FLICKR8K_RESNET = {**SMALL_RESNET, 'widths': (64, 128, 256), 'blocks': (1, 1, 1)}


def digits(c: Config, steps: int = 1000) -> None:
    """The embedded digits on 2 CPU cores, in about 3 minutes."""
    config_lib.dataset(c, 'digits')
    c.total_steps, c.batch_size = steps, 64
    c.log_every, c.checkpoint_every = 100, 500
    # No flips: a mirrored 2 is no digit.
    c.inputs.crop = {'scale': (0.5, 1.0), 'interpolation': 'bicubic', 'flip': 0.0}
    c.inputs.augment = {
        'jitter': {'prob': 0.8, 'brightness': 0.2, 'contrast': 0.4},
        'cutout': {'prob': 0.5},
    }
    c.model = SMALL_RESNET
    c.optim = {'name': 'adamw', 'learning_rate': 8e-3, 'weight_decay': 0.05, 'warmup': 0.1}
    c.evals = {'knn': {'k': 20, 'temperature': 0.07}, 'linear': {}}


def digits_vit(c: Config, steps: int = 1000, pool: str = 'mean') -> None:
    """The same with a small ViT."""
    digits(c, steps)
    c.model = {'name': 'vit', 'width': 96, 'depth': 4, 'heads': 3, 'patch': 4, 'pool': pool}


def grids(c: Config, steps: int) -> None:
    """Grids of four embedded digits with captions, on 2 CPU cores, in about 3 minutes."""
    digits_vit(c, steps)
    c.data.source = 'digits:grids'
    # Where a digit stands is what captions say: crops that cut little, and no flips.
    c.inputs.crop.scale = (0.9, 1.0)
    del c.inputs.augment.cutout
    text_tower(c, vocabulary=512, length=16, width=96, depth=2, heads=3)
    c.evals = {
        'retrieval': {},
        'zeroshot': {'templates': ('a {} at the top left',)},
    }
    c.optim.learning_rate = 4e-3


def text_tower(c: Config, vocabulary: int, length: int, **model: Any) -> None:
    """One view an image, and its caption read by a transformer (its keywords)."""
    c.inputs.views = 1
    c.inputs.name = 'captions'
    c.inputs.text = {'tokenizer': '', 'vocabulary': vocabulary, 'length': length, 'lower': True}
    c.text = {'name': 'transformer', **model}
    c.best = 'eval/retrieval/text_to_image_r1'


def flickr8k(c: Config, steps: int) -> None:
    """Flickr8k in Karpathy's layout, in less than 20 minutes of two CPU cores."""
    captions(c, batch=128)
    c.total_steps, c.inputs.size, c.inputs.view_size = steps, 64, 48
    c.log_every, c.checkpoint_every = 100, 500
    # 6,000 images are soon known by heart: small crops, flips, hidden words and much decay. Hues
    # stay. In views of 48 pixels things are as large as in whole pictures of 64 (Touvron et al.
    # 2019, arXiv:1906.06423).
    c.inputs.crop = {'scale': (0.25, 1.0), 'interpolation': 'bicubic', 'flip': 0.5}
    c.inputs.augment = {'jitter': {'prob': 0.8, 'brightness': 0.4, 'contrast': 0.4}}
    c.model = FLICKR8K_RESNET
    text = {'width': 128, 'depth': 1, 'heads': 2, 'causal': False, 'pool': 'mean'}
    text_tower(c, vocabulary=4096, length=24, **text, drop_tokens=0.2)
    c.optim.update({'learning_rate': 3e-3, 'weight_decay': 1.0, 'b2': 0.98})


def captions(c: Config, batch: int = 256, source: str = 'captions') -> None:
    """One's own pictures and captions, at a batch that one GPU holds; ViT-S and half of CLIP."""
    config_lib.dataset(c, 'captions')
    c.data.source = source
    c.total_epochs, c.batch_size = 30.0, batch
    # Captions name sides and colours: no flips, no jitter, crops that show most (OpenCLIP's).
    c.inputs.crop = {'scale': (0.9, 1.0), 'interpolation': 'bicubic', 'flip': 0.0}
    c.model = {'name': 'vit', 'size': 'S', 'patch': 16, 'pool': 'mean', 'dtype': 'bfloat16'}
    text_tower(c, vocabulary=8192, length=64, width=384, depth=6, heads=6, dtype='bfloat16')
    c.evals = {'retrieval': {}}
    c.optim = {'name': 'adamw', 'learning_rate': 2.5e-4, 'weight_decay': 0.1, 'warmup': 0.1}


def cifar10_small(c: Config, steps: int) -> None:
    """For few steps: small batches, crops not too small, colours that keep more of themselves."""
    config_lib.dataset(c, 'cifar10')
    c.total_steps, c.batch_size = steps, 64
    c.log_every, c.checkpoint_every = 100, 500
    c.inputs.crop.scale = (0.2, 1.0)
    # In views of 24 pixels things are as large as in whole pictures of 32 (Touvron et al. 2019,
    # arXiv:1906.06423), and a step takes 0.6 of the time.
    c.inputs.view_size = 24
    jitter = {**HALF_JITTER, 'saturation': 0.2, 'hue': 0.05}
    c.inputs.augment = {'jitter': jitter, 'grayscale': {'prob': 0.2}}
    c.model = CIFAR_RESNET
    # b2: with 0.999 the second moments of so short a run lag behind.
    c.optim = {
        'name': 'adamw',
        'learning_rate': 8e-3,
        'weight_decay': 0.05,
        'warmup': 0.05,
        'b2': 0.95,
    }
    c.evals = {'knn': {'k': 200, 'temperature': 0.1}, 'linear': {}}


def cifar10_small_vit(c: Config, steps: int, pool: str = 'mean') -> None:
    """The same with a small ViT."""
    cifar10_small(c, steps)
    c.inputs.view_size = 0
    c.model = {'name': 'vit', 'width': 192, 'depth': 4, 'heads': 3, 'patch': 8, 'pool': pool}
    c.optim.learning_rate = 4e-3


def cifar10(c: Config, epochs: float, batch: int) -> None:
    """CIFAR-10 with SimCLR's views for it and a ResNet-18, on one GPU."""
    config_lib.dataset(c, 'cifar10')
    c.total_epochs, c.batch_size = epochs, batch
    c.eval_every = 10_000
    c.inputs.augment = {'jitter': HALF_JITTER, 'grayscale': {'prob': 0.2}}
    c.model = {'name': 'resnet', 'size': 18, 'stem': 'cifar'}
    c.evals = {'knn': {'k': 200, 'temperature': 0.1}, 'linear': {}}


def solo_learn(c: Config, learning_rate: float, weight_decay: float) -> None:
    """solo-learn's CIFAR-10 recipe with an asymmetric pair, but for the method.

    There the stem pads by 2, so that maps have 34 × 34 places; here by 1, as everywhere else.
    """
    cifar10(c, epochs=1000.0, batch=256)
    asymmetric(c, blur=False)
    c.model.zero_init_last = False
    torch_lars(c, learning_rate, weight_decay, warmup=0.01)
    c.optim.update({'initial_fraction': 3e-5 / learning_rate, 'trust_coefficient': 0.02})
    c.optim.clip_ratio = True


def torch_lars(c: Config, learning_rate: float, weight_decay: float, warmup: float) -> None:
    """LARS whose rate is outside the momentum, as in torch and in BYOL's code."""
    c.optim = {
        'name': 'lars',
        'learning_rate': learning_rate,
        'weight_decay': weight_decay,
        'warmup': warmup,
        'classic_momentum': False,
    }


def torch_sgd(c: Config, learning_rate: float, weight_decay: float) -> None:
    """SGD as torch's, of which authors set no more than this.

    Paper's code (MoCo, SimSiam, PCL, SupContrast): the cosine moves once an epoch; here: every
    step, as in all recipes, because a step knows no epochs.
    """
    c.optim = {
        'name': 'sgd',
        'learning_rate': learning_rate,
        'weight_decay': weight_decay,
        'decayed': EVERYTHING,
    }


def torchvision(c: Config) -> None:
    """torchvision's defaults, where authors set nothing: the ResNet's start, how crops scale."""
    c.model.zero_init_last = False
    c.inputs.crop.interpolation = 'bilinear'


def imagenet(c: Config, epochs: float, batch: int) -> None:
    """ImageNet with SimCLR's views and a ResNet-50, on a TPU or GPU slice."""
    config_lib.dataset(c, 'imagenet')
    c.total_epochs, c.batch_size = epochs, batch
    c.eval_every = 10_000
    simclr_views(c)
    c.model = {'name': 'resnet', 'size': 50, 'stem': 'imagenet', 'dtype': 'bfloat16'}
    c.evals = {'knn': {'k': 20, 'temperature': 0.07}, 'linear': {}}


def imagenet_vit(c: Config, epochs: float, batch: int, size: str = 'S') -> None:
    """The same with a ViT of patch 16."""
    imagenet(c, epochs, batch)
    c.model = {'name': 'vit', 'size': size, 'patch': 16, 'pool': 'cls', 'dtype': 'bfloat16'}


def vissl(c: Config) -> None:
    """VISSL's pretext tasks with a ResNet-50 on ImageNet: 105 epochs, the rate falls in steps."""
    imagenet(c, epochs=105.0, batch=256)
    torchvision(c)
    milestones = (30 / 105, 60 / 105, 90 / 105, 100 / 105)
    sgd = {'name': 'sgd', 'learning_rate': 0.1, 'weight_decay': 1e-4}
    c.optim = {**sgd, 'milestones': milestones}


def tiles(
    c: Config, region: int, tile: int, jitter: int, colour: str, augment: dict[str, Any]
) -> None:
    """Nine tiles of each image, each standardised, and how well the task on them is solved."""
    kept = {k: c.inputs[k] for k in ('size', 'mean', 'std', 'crop', 'crop_fraction')}
    cut = {'grid': 3, 'region': region, 'tile': tile, 'jitter': jitter}
    defences = {'colour': colour, 'standardise': True, 'augment': augment}
    c.inputs = {'name': 'patches', **kept, **cut, **defences}
    c.evals.pretext = {}
    if c.data.source == 'digits':
        c.evals.linear.outputs = ('features', 'stage*')


def photographs(c: Config, steps: int) -> None:
    """Embedded digits on photographs, in colour, on 2 CPU cores, in about 3 minutes."""
    digits(c, steps)
    c.data.source, c.inputs.size = 'digits:photographs', 32
    c.inputs.crop.scale = (0.7, 1.0)
    c.model = CIFAR_RESNET


def photographs_64(c: Config, steps: int) -> None:
    """Flickr8k's photographs at 64 pixels, without their captions, on 2 CPU cores."""
    cifar10_small(c, steps)
    config_lib.dataset(c, 'captions')
    c.inputs.size, c.inputs.view_size, c.inputs.crop.scale = 64, 64, (0.5, 1.0)
    c.model = FLICKR8K_RESNET
    c.evals = {'collapse': {}}  # there are no classes


def lab(c: Config, sees: tuple[str, ...]) -> None:
    """One view an image in Lab, no colours changed; an encoder for each of what parts see."""
    kept = {k: c.inputs[k] for k in ('size', 'view_size', 'crop', 'crop_fraction')}
    c.inputs = {'name': 'lab', **kept, 'views': 1, 'augment': {}}
    c.model = {'name': 'lab', 'sees': sees, 'encoder': c.model}


def caffe_colours(c: Config) -> None:
    """Colorization as the authors train it (richzhang/colorization 4aa459f, train/).

    Authors: a VGG-like network without pooling, which ends in a map of places of 8 pixels and one
    transposed convolution; here: a ResNet-50, whose map the head doubles three times. Authors:
    weight decay is added to Adam's gradient; here: AdamW's. Authors: crops of 176 pixels of images
    of 256; here: square crops of about that share, at 192, of which 32 is a divisor.
    """
    imagenet(c, epochs=0.0, batch=40)
    c.total_steps = 500_000
    c.inputs.size, c.inputs.crop_fraction = 192, 192 / 256
    square = {'scale': (0.4, 0.55), 'ratio': (1.0, 1.0)}
    c.inputs.crop = {**square, 'interpolation': 'bilinear', 'flip': 0.5}
    adam = {'name': 'adamw', 'learning_rate': 3e-5 * 256 / 40, 'b2': 0.99, 'weight_decay': 1e-3}
    c.optim = {**adam, 'milestones': (0.45, 0.9), 'milestone_factor': 0.1}


def own_colours(c: Config) -> None:
    """The same on one's own images for 100 epochs, at a batch that one GPU holds."""
    folder(c)
    c.total_steps, c.total_epochs = 0, 100.0
    c.inputs.crop = {'scale': (0.2, 1.0), 'interpolation': 'bicubic', 'flip': 0.5}
    c.optim.learning_rate = 3e-4


def simclr_views(c: Config) -> None:
    """SimCLR's jitter for ImageNet, greyscale and blur."""
    c.inputs.augment = {
        'jitter': JITTER,
        'grayscale': {'prob': 0.2},
        'blur': {'prob': 0.5, 'sigma': (0.1, 2.0)},
    }


def asymmetric(c: Config, blur: bool = True) -> None:
    """BYOL's pair: one view always blurred, the other seldom blurred and sometimes solarised."""
    blurred = {'blur': {'prob': (1.0, 0.1), 'sigma': (0.1, 2.0)}} if blur else {}
    c.inputs.augment = {
        'jitter': BYOL_JITTER,
        'grayscale': {'prob': 0.2},
        **blurred,
        'solarize': {'prob': (0.0, 0.2)},
    }


def moco_v2(c: Config) -> None:
    """MoCo v2's views: a weaker jitter, crops of at least a fifth, scaled bilinearly."""
    c.inputs.augment = {
        'jitter': HALF_JITTER,
        'grayscale': {'prob': 0.2},
        'blur': {'prob': 0.5, 'sigma': (0.1, 2.0)},
    }
    c.inputs.crop.update({'scale': (0.2, 1.0), 'interpolation': 'bilinear'})


def multi_crop(c: Config, scale: float, local: int, size: int, least: float = 0.05) -> None:
    """Two global views that show more than a share `scale`, and `local` small ones of less."""
    c.inputs.crop.scale = (scale, 1.0)
    c.inputs.local_views, c.inputs.local_size, c.inputs.local_scale = local, size, (least, scale)


def dino_views(c: Config, scale: float) -> None:
    """BYOL's pair and eight local views of 96 pixels, which are blurred half of the time."""
    asymmetric(c)
    c.inputs.augment.blur.prob, c.inputs.augment.solarize.prob = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)
    multi_crop(c, scale=scale, local=8, size=96)


def freeze(c: Config, share: float, *modules: str) -> None:
    """Modules, by their paths, that begin to learn after a share of the run."""
    c.optim.modules = {module: {'frozen': share} for module in modules}


def folder(c: Config, batch: int = 256) -> None:
    """An ImageNet recipe on one's own pictures, at a batch that one GPU holds."""
    config_lib.dataset(c, 'folder')
    c.batch_size, c.eval_every = batch, 0
