"""Transformer blocks over tokens, and attention that pools them: what encoders are built of.

Dimension key: B batch, N patches, T S tokens, D width, K heads, F width of a head.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from contrastive_jax.config import UserError

ACTIVATIONS = {
    'gelu_tanh': partial(nn.gelu, approximate=True),
    'gelu': partial(nn.gelu, approximate=False),
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
}

# Initialisation as MoCo v3 (Chen et al. 2021): Xavier-uniform kernels, zero biases, and each of
# q, k, v as a matrix of its own: sqrt(6 / (D + D)) = sqrt(3 / D), the bound of LeCun-uniform.
Initializer = nn.initializers.Initializer
xavier = nn.initializers.xavier_uniform()
xavier_qkv = nn.initializers.lecun_uniform()


def check_width(width: int, heads: int, who: str) -> None:
    """Raises UserError unless a method's transformer can have these heads, and 2-D positions."""
    if width % heads or width % 4:
        raise UserError(
            f'config.method.width: got {width}; {who} expects a multiple of heads={heads} and of 4.'
        )


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10000.0) -> np.ndarray:
    """Fixed 2-D positions: half of the channels for the row, half for the column.

    Args:
        rows, columns: patches in the grid.
        width: channels, divisible by 4.
        temperature: the longest wavelength is 2π times about this many patches.

    Returns:
        [rows * columns, width] float32 `[sin(rω), cos(rω), sin(cω), cos(cω)]` with
        ω_i = temperature^(−i / (width / 4)), patches in row-major order.

    Source: MoCo v3 (Chen et al. 2021, arXiv:2104.02057), section 5; equal to its code.
    """
    omega = temperature ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [row[:, None] * omega[None, :], column[:, None] * omega[None, :]]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1, dtype=np.float32)


class Attention(nn.Module):
    """Multi-head self-attention of tokens that are flattened to [B T, D]; softmax in float32.

    Returns them and the softmax's weights [B, K, T, T], of each token (third axis) over all.
    `seen`, bool [B, T, T] or [1, T, T], says which tokens (last axis) each one sees; None: all.
    """

    heads: int
    dtype: jnp.dtype
    qkv_init: Initializer = xavier_qkv

    @nn.compact
    def __call__(
        self, x: jax.Array, batch: int, seen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, dtype=self.dtype, kernel_init=self.qkv_init, name='qkv')(x)
        q, k, v = rearrange(
            qkv, '(B T) (three K F) -> three B K T F', B=batch, three=3, K=self.heads
        )
        q = q * (width // self.heads) ** -0.5
        scores = jnp.einsum('BKTF,BKSF->BKTS', q, k, preferred_element_type=jnp.float32)
        if seen is not None:
            # Not −inf: a token that sees nothing must not become NaN.
            scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        x = rearrange(jnp.einsum('BKTS,BKSF->BKTF', weights, v), 'B K T F -> (B T) (K F)')
        return nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name='out')(x), weights


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on tokens that are flattened to [B T, D].

    Each branch is scaled per channel (layer_scale, its initial value) and, in training, left out
    for a share drop_path of the images; both as in `make`. Returns the tokens and, but in training,
    the attention's weights.
    """

    heads: int
    hidden: int
    dtype: jnp.dtype
    drop_path: float = 0.0
    layer_scale: float | None = None
    activation: str = 'gelu_tanh'
    epsilon: float = 1e-6
    qkv_init: Initializer = xavier_qkv

    @nn.compact
    def __call__(
        self, x: jax.Array, batch: int, train: bool = False, seen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        norm = partial(nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        y = norm(name='norm1')(x)
        attention = Attention(self.heads, self.dtype, self.qkv_init, name='attention')
        y, weights = attention(y, batch, seen)
        x = x + self._branch('layer_scale1', y, batch, train)
        y = norm(name='norm2')(x)
        y = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=xavier, name='mlp1')(y)
        y = ACTIVATIONS[self.activation](y)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name='mlp2')(y)
        return x + self._branch('layer_scale2', y, batch, train), None if train else weights

    def _branch(self, name: str, y: jax.Array, batch: int, train: bool) -> jax.Array:
        """A branch's output, scaled and maybe dropped, as the residual stream adds it."""
        if self.layer_scale is not None:
            start = nn.initializers.constant(self.layer_scale)
            y = y * self.param(name, start, (y.shape[-1],)).astype(y.dtype)[None, :]
        # A teacher has no key: it sees its batch's statistics, but drops nothing (DINO).
        if not (train and self.drop_path and self.has_rng('drop')):
            return y
        keep = 1.0 - self.drop_path
        kept_B11 = jax.random.bernoulli(self.make_rng('drop'), keep, (batch, 1, 1))
        images = y.reshape(batch, -1, y.shape[-1])
        return jnp.where(kept_B11, images / keep, 0.0).reshape(y.shape)


class MAP(nn.Module):
    """Tokens as a learned probe attends to them, then a residual MLP; all in float32.

    Source: Zhai et al. 2022, arXiv:2106.04560, section 3.3, whose name for it is "MAP"; SigLIP.
    """

    heads: int
    hidden: int
    activation: str
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, D]."""
        width, K = x.shape[-1], self.heads
        dense = partial(nn.Dense, width, kernel_init=xavier)
        probe = self.param('probe', nn.initializers.normal(width**-0.5), (1, 1, width))
        q = dense(name='query')(probe[0]) * (width // K) ** -0.5
        q = rearrange(q, '1 (K F) -> K F', K=K)
        k = rearrange(dense(name='key')(x), 'B N (K F) -> B N K F', K=K)
        v = rearrange(dense(name='value')(x), 'B N (K F) -> B N K F', K=K)
        weights = jax.nn.softmax(jnp.einsum('KF,BNKF->BKN', q, k), axis=-1)
        pooled = rearrange(jnp.einsum('BKN,BNKF->BKF', weights, v), 'B K F -> B (K F)')
        x = dense(name='out')(pooled)
        y = nn.LayerNorm(epsilon=self.epsilon, name='norm')(x)
        y = nn.Dense(self.hidden, kernel_init=xavier, name='mlp1')(y)
        return x + dense(name='mlp2')(ACTIVATIONS[self.activation](y))
