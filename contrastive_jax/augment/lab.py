"""CIE Lab: lightness L in [0, 100] and two axes of colour, a and b, both 0 of what is grey.

sRGB, illuminant D65, observer 2°, the numbers of scikit-image, whose `rgb2lab` and `lab2rgb` these
are within 1e-3.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TO_XYZ = np.asarray(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ]
)
TO_RGB = np.linalg.inv(TO_XYZ)
WHITE = (0.95047, 1.0, 1.08883)
SCALE = 50.0  # networks see (L − 50, a, b) / 50


def rgb_to_lab(rgb: Any, xp: Any = jnp) -> Any:
    """Lab [..., 3] of sRGB [..., 3] in [0, 1].

    Args:
        rgb: float; a jax.Array, or whatever xp computes with.
        xp: jax.numpy, or numpy, for the host and in float64.
    """
    # Slices and sums: on a CPU XLA reduces over so short an axis slowly, and a TPU would multiply
    # matrices in bfloat16.
    linear = [_linear(rgb[..., i], xp) for i in range(3)]
    xyz = [_dot(row, linear) / white for row, white in zip(TO_XYZ, WHITE, strict=True)]
    x, y, z = (xp.where(t > 0.008856, xp.cbrt(t), 7.787 * t + 16 / 116) for t in xyz)
    return xp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def lab_to_rgb(lab: Any, xp: Any = jnp) -> Any:
    """sRGB [..., 3] in [0, 1] of Lab [..., 3]; what sRGB cannot show is clipped, as scikit-image's.

    Args:
        lab: float; a jax.Array, or whatever xp computes with.
        xp: jax.numpy or numpy.
    """
    y = (lab[..., 0] + 16) / 116
    xyz = [lab[..., 1] / 500 + y, y, xp.maximum(y - lab[..., 2] / 200, 0)]
    xyz = [
        xp.where(t > 0.2068966, t**3, (t - 16 / 116) / 7.787) * white
        for t, white in zip(xyz, WHITE, strict=True)
    ]
    rgb = xp.stack([_dot(row, xyz) for row in TO_RGB], axis=-1)
    root = 1.055 * xp.maximum(rgb, 0.0031308) ** (1 / 2.4) - 0.055
    return xp.clip(xp.where(rgb > 0.0031308, root, 12.92 * rgb), 0, 1)


def scaled(lab: jax.Array) -> jax.Array:
    """Lab as networks see it, [..., 3]: each value about 0, L within [-1, 1]."""
    return jnp.stack([lab[..., 0] - 50, lab[..., 1], lab[..., 2]], axis=-1) / SCALE


def unscaled(x: jax.Array) -> jax.Array:
    """Lab of what networks see, [..., 3]."""
    x = x * SCALE
    return jnp.stack([x[..., 0] + 50, x[..., 1], x[..., 2]], axis=-1)


def _linear(x: Any, xp: Any) -> Any:
    curved = ((xp.maximum(x, 0.04045) + 0.055) / 1.055) ** 2.4
    return xp.where(x > 0.04045, curved, x / 12.92)


def _dot(row: np.ndarray, values: Any) -> Any:
    return sum(float(weight) * x for weight, x in zip(row, values, strict=True))
