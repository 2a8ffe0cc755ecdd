"""A transformer that makes patches of an image from those that an encoder has seen.

Dimension key: B batch, N patches of the image, n of them seen, F tokens that are no patches (CLS),
D width of the encoder, P values of a patch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax.layers.blocks import Block, sincos2d, xavier


class Decoder(nn.Module):
    """MAE's decoder (He et al. 2022, arXiv:2111.06377, section 3), with its own fixed positions.

    A learned token stands for every patch that was not seen; it starts at N(0, 0.02²).

    Attributes:
        rows, columns: of the image's patches, N = rows · columns.
        out: P.
        width: of the blocks, a multiple of heads and of 4.
        depth: blocks.
        heads: of their attention.
        activation: of their MLPs, which are four times as wide.
        dtype: of the blocks' computation; the last norm and the last layer are float32.
    """

    rows: int
    columns: int
    out: int
    width: int
    depth: int
    heads: int
    activation: str = 'gelu_tanh'
    dtype: jnp.dtype = jnp.dtype('float32')

    @nn.compact
    def __call__(
        self, seen: jax.Array, train: bool, place: jax.Array, before: jax.Array | None = None
    ) -> jax.Array:
        """[B, n, D] -> [B, N, P], float32.

        Args:
            seen: the encoder's outputs of the patches that it saw.
            train: as for every module.
            place: int32 [B, N], where each patch of the image is in `seen`; from n on: nowhere.
            before: [B, F, D], the encoder's other tokens, whose outputs are dropped.
        """
        B, n = seen.shape[:2]
        F = 0 if before is None else before.shape[1]
        tokens = seen if before is None else jnp.concatenate([before, seen], axis=1)
        x = rearrange(tokens.astype(self.dtype), 'B T D -> (B T) D')
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name='embedding')(x)
        x = x.reshape(B, F + n, self.width)
        token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
        patches = jnp.take_along_axis(x[:, F:], jnp.minimum(place, n - 1)[:, :, None], axis=1)
        patches = jnp.where((place < n)[:, :, None], patches, token.astype(x.dtype))
        positions = jnp.asarray(sincos2d(self.rows, self.columns, self.width))[None]
        x = jnp.concatenate([x[:, :F], patches + positions.astype(x.dtype)], axis=1)
        x = rearrange(x, 'B T D -> (B T) D')
        for i in range(self.depth):
            x, _ = Block(
                *(self.heads, 4 * self.width, self.dtype),
                activation=self.activation,
                qkv_init=xavier,
                name=f'block{i}',
            )(x, B, train)
        x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')(x)
        x = nn.Dense(self.out, dtype=jnp.float32, kernel_init=xavier, name='out')(x)
        return x.reshape(B, F + self.rows * self.columns, self.out)[:, F:]
