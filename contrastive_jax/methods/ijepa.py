"""I-JEPA (Assran et al. 2023, https://arxiv.org/abs/2301.08243).

From the patches of a context a network predicts the features that a slowly moving teacher, which
sees the whole image, has of some blocks: features, not pixels, and no augmented views. A ViT
computes the context alone. Evaluators see the teacher, by default of the patches' mean.

Dimension key: B batch, N patches, n in view, K blocks of at most M patches, D features.
"""

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from contrastive_jax import losses, models
from contrastive_jax.augment.masking import multi_block
from contrastive_jax.config import check_range, choose
from contrastive_jax.layers.blocks import ACTIVATIONS, check_width
from contrastive_jax.layers.predictor import Predictor
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.models.vit import DTYPES
from contrastive_jax.networks.chain import Chain, patch_grid
from contrastive_jax.networks.target import Target, ramp

EPSILON = 1e-5  # beside the variance of a target's features


def make(
    model: models.Encoder,
    *,
    momentum: float = 0.996,
    blocks: int = 4,
    scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    context: tuple[float, float] = (0.85, 1.0),
    width: int = 384,
    depth: int = 12,
    heads: int = 16,
    activation: str = 'gelu_tanh',
    dtype: str = 'float32',
) -> Method:
    """I-JEPA around a ViT, on every view of every image.

    Args:
        model: the encoder; takes `keep` and gives 'patches'. The authors' has no CLS token
            (pool='mean'); what one would say is not trained.
        momentum: of the teacher at the start, from 0 to 1; it rises to 1 linearly.
        blocks, scale, aspect, context: number, size and shape of the blocks that are predicted, and
            size of the one around what is in view, see `augment.masking.multi_block`.
        width, depth, heads: of the predictor; width is a multiple of heads and of 4.
        activation: of the predictor, see `models.vit`.
        dtype: of the predictor's computation, 'float32' or 'bfloat16'.
    """
    sizes = {'blocks': blocks, 'width': width, 'depth': depth, 'heads': heads}
    check_range('config.method', sizes, least=1, whole=True, who='ijepa')
    check_range('config.method', {'momentum': momentum}, least=0, most=1, who='ijepa')
    choose('activation', activation, ACTIVATIONS, 'config.method')
    compute = choose('dtype', dtype, DTYPES, 'config.method')
    check_width(width, heads, 'ijepa')
    network = Chain(model)
    target = Target(network, ('encoder',), lambda progress: ramp(progress, momentum, 1.0, share=1))
    shapes = {'blocks': blocks, 'scale': scale, 'aspect': aspect, 'context': context}

    def predictor(images: jax.Array, features: int) -> Predictor:
        rows, columns = patch_grid('ijepa', model, images)
        return Predictor(rows, columns, features, width, depth, heads, activation, compute)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        key, predictor_key = jax.random.split(key)
        params, extra = target.init(key, batch, records)
        images = batch['views'][:, 0]
        grid = patch_grid('ijepa', model, images)
        masks = multi_block(key, len(images), *grid, **shapes)
        patches = network.features(params, extra['stats'], images)['patches']
        params['predictor'], _ = models.init(
            predictor(images, patches.shape[2]),
            predictor_key,
            patches[:, : masks.context.shape[1]],
            **masks._asdict(),
        )
        return params, extra

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        mask_key, key = jax.random.split(key)
        images = rearrange(batch['views'], 'b v h w c -> (b v) h w c')
        masks = multi_block(mask_key, len(images), *patch_grid('ijepa', model, images), **shapes)
        out, stats = network(params, extra['stats'], images, key=key, keep=masks.context)
        patches = out['named']['patches']
        predicted, _ = models.apply(
            *(predictor(images, patches.shape[2]), params['predictor'], {}, patches, True),
            **masks._asdict(),
        )
        taught, target_state = target.views(extra['target'], batch['views'])
        wanted = normalised(rearrange(taught['named']['patches'], 'b v n d -> (b v) n d'))
        places = rearrange(masks.targets, 'B K M -> B (K M)')
        wanted = jnp.take_along_axis(wanted, places[:, :, None], axis=1).reshape(predicted.shape)
        error_BKM = optax.huber_loss(predicted, wanted).mean(axis=3)  # smooth L1
        counts_BKM = jnp.broadcast_to(masks.counts, error_BKM.shape)
        value = jnp.sum(jnp.where(counts_BKM, error_BKM, 0.0)) / jnp.sum(counts_BKM)
        metrics = {'output_std': losses.output_std(taught['encoder'][:, 0])}
        return value, Aux({**extra, 'stats': stats, 'target': target_state}, metrics)

    return Method(init, loss, target.encode, target.follow, encoders=target.encoders)


def normalised(x: jax.Array) -> jax.Array:
    """Features of mean 0 and variance 1, each patch by itself."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
