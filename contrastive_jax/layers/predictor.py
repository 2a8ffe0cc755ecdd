"""A transformer that predicts the features of hidden patches from those of patches in view.

Dimension key: B batch, N patches of the image, n of them in view, K blocks of M patches to predict,
T = n + M tokens, D width of the encoder, W own width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from contrastive_jax.layers.blocks import Block, sincos2d, xavier


class Predictor(nn.Module):
    """I-JEPA's predictor (Assran et al. 2023, arXiv:2301.08243, section 3): a narrow ViT.

    It sees the patches in view and, of one block at a time, a learned token at each patch; all with
    fixed positions of its own. The token starts at N(0, 0.02²). Authors' code: so do all matrices;
    here: Xavier-uniform, as in the ViTs.

    Attributes:
        rows, columns: of the image's patches, N = rows · columns.
        out: D.
        width: W, a multiple of heads and of 4.
        depth: blocks of the transformer.
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
        self,
        seen: jax.Array,
        train: bool,
        context: jax.Array,
        targets: jax.Array,
        counts: jax.Array,
    ) -> jax.Array:
        """[B, n, D] -> [B, K, M, D], float32.

        Args:
            seen: the encoder's outputs of the patches in view.
            train: as for every module.
            context: int32 [B, n], which patches of the image these are.
            targets: int32 [B, K, M], which ones are to be predicted.
            counts: bool [M], whether they are: those that do not count are hidden from the others.
        """
        B, n = seen.shape[:2]
        K, M = targets.shape[1:]
        position = jnp.asarray(sincos2d(self.rows, self.columns, self.width), self.dtype)
        x = rearrange(seen.astype(self.dtype), 'B n D -> (B n) D')
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name='embedding')(x)
        x = repeat(x.reshape(B, n, self.width) + position[context], 'B n W -> (B K) n W', K=K)
        token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
        asked = token.astype(x.dtype) + rearrange(position[targets], 'B K M W -> (B K) M W')
        x = rearrange(jnp.concatenate([x, asked], axis=1), 'R T W -> (R T) W')
        visible = jnp.concatenate([jnp.ones(n, bool), counts])
        visible = jnp.broadcast_to(visible[None, None], (1, n + M, n + M))
        for i in range(self.depth):
            x, _ = Block(
                *(self.heads, 4 * self.width, self.dtype),
                activation=self.activation,
                qkv_init=xavier,
                name=f'block{i}',
            )(x, B * K, train, visible)
        x = rearrange(x, '(R T) W -> R T W', T=n + M)[:, n:].reshape(-1, self.width)
        x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')(x)
        x = nn.Dense(self.out, dtype=jnp.float32, kernel_init=xavier, name='out')(x)
        return x.reshape(B, K, M, self.out)
