"""DCGAN's discriminator without its last layer (Radford et al. 2016, arXiv:1511.06434).

Context encoders have it as their encoder and as their critic: Pathak et al. 2016, arXiv:1604.07379,
and their code, pathak22/context-encoder.

Dimension key: B batch, H W image, C channels, h w map, D features.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax.config import UserError, check_range, choose, each
from contrastive_jax.layers.convolution import Down
from contrastive_jax.models.resnet import DTYPES


class DCGAN(nn.Module):
    """See `make`."""

    widths: tuple[int, ...]
    remat: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        if min(x.shape[1:3]) < 2 ** len(self.widths):
            raise UserError(
                f'config.model.widths: {len(self.widths)} of them need images of at least '
                f'{2 ** len(self.widths)} pixels a side; got {list(x.shape[1:3])}.'
            )
        block = nn.remat(Down, static_argnums=2) if self.remat else Down
        maps: list[jax.Array] = []
        for i, width in enumerate(self.widths, 1):
            x = block(width, i > 1, self.dtype, name=f'block{i}')(x, train)
            maps.append(x)
        x = x.astype(jnp.float32)
        named = [] if train else [y.astype(jnp.float32) for y in maps[:-1]]
        return x.mean(axis=(1, 2)), {**{f'block{i}': y for i, y in enumerate(named, 1)}, 'map': x}


def make(
    *,
    widths: Sequence[int] = (64, 64, 128, 256, 512),
    remat: bool = False,
    dtype: str = 'float32',
) -> DCGAN:
    """Convolutions 4 x 4 of stride 2, each with BatchNorm (but the first) and LeakyReLU.

    Called as `module(x_BHWC, train)`, it returns the globally pooled features [B, D] and
    `{'map': [B, h, w, D]}`, float32, h = H / 2^n of n convolutions. With train=False there are also
    the maps after the others, 'block1', 'block2', ... BatchNorm as in models/resnet. There are no
    biases: the authors' code sets those of convolutions to 0 before every step. Authors' code:
    BatchNorm's scales begin at N(1, 0.02²); here: at 1.

    Args:
        widths: channels of each convolution, D the last.
        remat: keep no activations within a block but compute them again for the gradient: less
            memory, a third more time.
        dtype: of the computation, 'float32' or 'bfloat16'. Parameters, batch statistics and the
            results are float32 in both.

    Raises:
        UserError: a value outside those; (when called) images with a side below 2^n.
    """
    where = 'config.model'
    if not widths:
        raise UserError(f'{where}.widths: got none; expected at least one.')
    check_range(where, each('widths', widths), least=1, whole=True)
    return DCGAN(tuple(widths), remat, choose('dtype', dtype, DTYPES, where))
