"""MAE (He et al. 2022, https://arxiv.org/abs/2111.06377): masked autoencoders.

Most patches of an image are hidden. A ViT encodes the others alone, which makes it cheap, and a
smaller transformer draws the hidden ones from that. Evaluators see the encoder, on whole images.

Dimension key: B batch, N patches, n of them seen, P values of a patch.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import models
from contrastive_jax.augment.masking import image_key
from contrastive_jax.config import check_range, choose
from contrastive_jax.layers.blocks import ACTIVATIONS, check_width
from contrastive_jax.layers.decoder import Decoder
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.models.vit import DTYPES
from contrastive_jax.networks.chain import Chain, patch_grid, seen

EPSILON = 1e-6  # beside the variance of a patch


def make(
    model: models.Encoder,
    *,
    mask_ratio: float = 0.75,
    normalise: bool = True,
    width: int = 512,
    depth: int = 8,
    heads: int = 16,
    activation: str = 'gelu_tanh',
    dtype: str = 'float32',
) -> Method:
    """MAE around a ViT, on every view of every image.

    Beside the encoder's outputs evaluators can have 'filled' [B, H, W, C], images whose hidden
    patches are drawn, and 'hidden' [B, H, W, 1], 1 where they are. There an image's mask depends on
    the image alone. With `normalise` a patch is drawn with the mean and the variance of the true
    one, which the model does not say.

    Args:
        model: the encoder; takes `keep` and gives 'patches', and 'cls' if it has one.
        mask_ratio: share of the patches that is hidden, in [0, 1); at least one is seen. Where none
            is hidden, this is an autoencoder, and all patches count.
        normalise: each patch that is to be drawn has mean 0 and variance 1.
        width, depth, heads: of the decoder; width is a multiple of heads and of 4.
        activation: of the decoder, see `models.vit`.
        dtype: of the decoder's computation, 'float32' or 'bfloat16'.
    """
    sizes = {'width': width, 'depth': depth, 'heads': heads}
    check_range('config.method', sizes, least=1, whole=True, who='mae')
    check_range('config.method', {'mask_ratio': mask_ratio}, least=0, below=1, who='mae')
    choose('activation', activation, ACTIVATIONS, 'config.method')
    compute = choose('dtype', dtype, DTYPES, 'config.method')
    check_width(width, heads, 'mae')
    network = Chain(model)

    def grid(images: jax.Array) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid('mae', model, images)

    def decode(images: jax.Array) -> Decoder:
        rows, columns = grid(images)
        out = math.prod(images.shape[1:]) // (rows * columns)
        return Decoder(rows, columns, out, width, depth, heads, activation, compute)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        key, decoder_key = jax.random.split(key)
        images = batch['views'][:, 0]
        decoder = decode(images)
        params, stats = network.init(key, images)
        named = network.features(params, stats, images)
        N = named['patches'].shape[1]
        place = jnp.broadcast_to(jnp.arange(N)[None], (len(images), N))
        params['decoder'], _ = models.init(
            decoder, decoder_key, named['patches'], place=place, **others(named)
        )
        return params, {'stats': stats}

    def others(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {'before': named['cls'][:, None]} if 'cls' in named else {}

    def draw(
        params: Tree,
        stats: Tree,
        images: jax.Array,
        noise_BN: jax.Array,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """All patches as drawn, [B, N, P], which of them are hidden, and the averages.

        The encoder sees the patches whose noise is lowest.
        """
        N = noise_BN.shape[1]
        n = max(1, int(N * (1 - mask_ratio)))
        order_BN = jnp.argsort(noise_BN, axis=1).astype(jnp.int32)
        place_BN = jnp.argsort(order_BN, axis=1).astype(jnp.int32)
        out, stats = network(params, stats, images, train=train, key=key, keep=order_BN[:, :n])
        named, decoder = out['named'], decode(images)
        drawn, _ = models.apply(
            *(decoder, params['decoder'], {}, named['patches'], train),
            **{'place': place_BN, **others(named)},
        )
        return drawn, place_BN >= n, stats

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        mask_key, key = jax.random.split(key)
        images = rearrange(batch['views'], 'b v h w c -> (b v) h w c')
        N = math.prod(grid(images))
        noise_BN = jax.random.uniform(mask_key, (len(images), N))
        drawn, hidden_BN, stats = draw(params, extra['stats'], images, noise_BN, True, key)
        target, mean, scale = patches(images, N)
        target = (target - mean) / scale if normalise else target
        error_BN = jnp.mean((drawn - target) ** 2, axis=2)
        counts_BN = hidden_BN | ~hidden_BN.any()
        value = jnp.sum(jnp.where(counts_BN, error_BN, 0.0)) / jnp.sum(counts_BN)
        return value, Aux({**extra, 'stats': stats}, {})

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        images = seen(batch)
        rows, columns = grid(images)
        found = network.features(params, extra['stats'], images)
        noise_BN = jax.vmap(lambda x: jax.random.uniform(image_key(x), (rows * columns,)))(images)
        drawn, hidden_BN, _ = draw(params, extra['stats'], images, noise_BN, False)
        true, mean, scale = patches(images, rows * columns)
        drawn = drawn * scale + mean if normalise else drawn
        filled = jnp.where(hidden_BN[:, :, None], drawn, true)
        height, wide = images.shape[1] // rows, images.shape[2] // columns

        def whole(x_BNP: jax.Array) -> jax.Array:
            pattern = 'B (h w) (p q C) -> B (h p) (w q) C'
            return rearrange(x_BNP, pattern, h=rows, p=height, q=wide)

        hidden = jnp.repeat(hidden_BN[:, :, None].astype(jnp.float32), height * wide, axis=2)
        return {**found, 'filled': whole(filled), 'hidden': whole(hidden)}

    return Method(init, loss, encode)


def patches(images: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Square patches [B, N, P], in rows of pixels, their means and deviations [B, N, 1].

    Args:
        images: [B, H, W, C].
        count: N.
    """
    side = round(math.sqrt(images.shape[1] * images.shape[2] / count))
    x = rearrange(images, 'B (h p) (w q) C -> B (h w) (p q C)', p=side, q=side)
    mean, variance = x.mean(2, keepdims=True), x.var(2, keepdims=True, ddof=1)
    return x, mean, jnp.sqrt(variance + EPSILON)
