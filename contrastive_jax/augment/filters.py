"""Operations on a pixel's neighbourhood, and noise: noise, blur, sobel.

Shapes: B batch, V views, C=3 channels, H W pixels, T taps of a kernel.
Each function checks its options and returns the operation, see options.Apply.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax.augment.color import luma, spread
from contrastive_jax.augment.options import Apply, Frame, chance, interval, number
from contrastive_jax.config import UserError


def noise(frame: Frame, *, prob: float | Sequence[float], std: float = 0.1) -> Apply:
    """Adds Gaussian noise, independent for each channel of each pixel, and clips to [0, 1].

    Args:
        frame: of the operation.
        prob: probability of an image, in [0, 1]; a number or one a view.
        std: standard deviation, in units of [0, 1].
    """
    coin = chance(prob, frame)
    std = number('std', std, frame, 0)

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        scale = spread(jnp.where(coin(draw), std, 0.0), x)
        # Two axes, because XLA is slow to compile a draw of five on a CPU.
        normal = jax.random.normal(key, (len(x), x[0].size)).reshape(x.shape)
        return jnp.clip(x + scale * normal, 0, 1)

    return apply


def blur(
    frame: Frame,
    *,
    prob: float | Sequence[float],
    sigma: float | Sequence[float] = (0.1, 2.0),
    kernel: int | None = None,
) -> Apply:
    """Gaussian blur; each image draws its sigma. Borders reflect, as torchvision's do.

    Paper (SimCLR's code): zero padding; here: reflection, because zeros darken the border.

    Args:
        frame: of the operation.
        prob: probability of an image, in [0, 1]; a number or one a view.
        sigma: the range that the standard deviation is drawn from, in pixels, above 0.
        kernel: taps, odd; None is the paper's 10 % of the side: 2 * (side // 10 // 2) + 1, which
            is 3 for 32 pixels and 23 for 224, and at least 3.
    """
    coin = chance(prob, frame)
    low, high = interval('sigma', sigma, frame, 0.01)
    taps = max(3, frame.size // 10 // 2 * 2 + 1) if kernel is None else kernel
    if not isinstance(taps, int) or taps % 2 == 0 or not 1 <= taps < 2 * frame.size:
        raise UserError(
            f'{frame.where}.kernel: expected an odd number below twice the side '
            f'({frame.size}), got {kernel!r}.'
        )
    radius = taps // 2

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        sigma_BV = low + (high - low) * draw[..., 1]
        return blur_by(x, sigma_BV, coin(draw), radius)

    return apply


def blur_by(x_BVCHW: jax.Array, sigma_BV: jax.Array, on_BV: jax.Array, radius: int) -> jax.Array:
    """Separable Gaussian blur with a sigma for each image; images not `on` keep their bits.

    An image is multiplied from both sides by its own banded matrix, the sum over distances t of
    weight_t * (pixel i sees pixel j at distance t), reflection included. A depthwise convolution
    would be B * V * C groups of one channel, and XLA's CPU backend computes the input of a sum of
    shifted images anew for each tap.

    Args:
        x_BVCHW: images in [0, 1].
        sigma_BV: standard deviations in pixels.
        on_BV: which images to blur.
        radius: of the kernel, below the side.
    """
    side = x_BVCHW.shape[3]
    sees_THH = np.zeros((radius + 1, side, side), np.float32)
    for offset in range(-radius, radius + 1):
        i = np.arange(side)
        j = np.abs(i + offset)
        j = np.where(j >= side, 2 * (side - 1) - j, j)
        sees_THH[abs(offset), i, j] += 1
    distance_T = np.arange(radius + 1, dtype=np.float32)[None, None, :]
    weight_BVT = jnp.exp(-0.5 * (distance_T / sigma_BV[..., None]) ** 2)
    weight_BVT /= 2 * weight_BVT.sum(-1, keepdims=True) - weight_BVT[..., :1]
    weight_BVT = jnp.where(on_BV[..., None], weight_BVT, distance_T == 0)
    band_BVHH = jnp.einsum('bvt,tij->bvij', weight_BVT, sees_THH, precision='highest')
    rows = jnp.einsum('bvchw,bvxw->bvchx', x_BVCHW, band_BVHH, precision='highest')
    # Repeated for each channel, the band makes a plain batched product, which XLA does best.
    band_BVCHH = jnp.broadcast_to(band_BVHH[:, :, None], x_BVCHW.shape)
    return jnp.einsum('bvcyh,bvchx->bvcyx', band_BVCHH, rows, precision='highest')


def sobel(frame: Frame, *, prob: float | Sequence[float]) -> Apply:
    """Sobel filtering: the magnitude of the luma's gradient, in all three channels.

    sqrt(gx² + gy²) / sqrt(20), with gx the correlation with [1 2 1]ᵀ [-1 0 1], gy its transpose,
    and borders repeated (scipy.ndimage.sobel, mode 'nearest'). sqrt(20) is the largest magnitude
    that luma in [0, 1] can have, so no clip is needed.

    Args:
        frame: of the operation.
        prob: probability of an image, in [0, 1]; a number or one a view.
    """
    coin = chance(prob, frame)

    # As products with two matrices, for the reason that blur_by gives.
    before, after = (np.eye(frame.size, k=k, dtype=np.float32) for k in (-1, 1))
    before[0, 0] = after[-1, -1] = 1
    smooth, steep = before + 2 * np.eye(frame.size, dtype=np.float32) + after, after - before

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        grey = luma(x)

        def filtered(columns: np.ndarray, rows: np.ndarray) -> jax.Array:
            y = jnp.einsum('bvchw,xw->bvchx', grey, rows, precision='highest')
            return jnp.einsum('yh,bvchx->bvcyx', columns, y, precision='highest')

        gx, gy = filtered(smooth, steep), filtered(steep, smooth)
        magnitude = jnp.sqrt((gx * gx + gy * gy) / 20)
        return jnp.where(spread(coin(draw), x), magnitude, x)

    return apply
