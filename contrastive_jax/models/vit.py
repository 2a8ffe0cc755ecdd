"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): pre-norm, any image size.

Dimension key: B batch, H W image, C channels, P patch, N patches, T tokens (N, or N + 1 with CLS),
D width, K heads, F width of a head.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from contrastive_jax.config import UserError, choose

SIZES = {  # Touvron et al. 2021 (Ti, S), Dosovitskiy et al. 2021 table 1 (B, L)
    'Ti': {'width': 192, 'depth': 12, 'heads': 3},
    'S': {'width': 384, 'depth': 12, 'heads': 6},
    'B': {'width': 768, 'depth': 12, 'heads': 12},
    'L': {'width': 1024, 'depth': 24, 'heads': 16},
    'custom': {},
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
POOLS = {'cls': True, 'mean': False}  # has a CLS token?
POSITIONS = ('sincos2d', 'learned')

# Initialisation as MoCo v3 (Chen et al. 2021): Xavier-uniform kernels, zero biases, and each of
# q, k, v as a matrix of its own: sqrt(6 / (D + D)) = sqrt(3 / D), the bound of LeCun-uniform.
xavier = nn.initializers.xavier_uniform()
xavier_qkv = nn.initializers.lecun_uniform()


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

    @nn.compact
    def __call__(
        self, x: jax.Array, batch: int, seen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, dtype=self.dtype, kernel_init=xavier_qkv, name='qkv')(x)
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

    @nn.compact
    def __call__(
        self, x: jax.Array, batch: int, train: bool = False, seen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        y = nn.LayerNorm(dtype=self.dtype, name='norm1')(x)
        y, weights = Attention(self.heads, self.dtype, name='attention')(y, batch, seen)
        x = x + self._branch('layer_scale1', y, batch, train)
        y = nn.LayerNorm(dtype=self.dtype, name='norm2')(x)
        y = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=xavier, name='mlp1')(y)
        # Paper: exact GELU; here: its tanh form, because exact takes twice as long on a CPU.
        y = nn.gelu(y, approximate=True)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name='mlp2')(y)
        return x + self._branch('layer_scale2', y, batch, train), None if train else weights

    def _branch(self, name: str, y: jax.Array, batch: int, train: bool) -> jax.Array:
        """What is added to the residual stream of a branch's output."""
        if self.layer_scale is not None:
            start = nn.initializers.constant(self.layer_scale)
            y = y * self.param(name, start, (y.shape[-1],)).astype(y.dtype)[None, :]
        # A teacher has no key: it sees its batch's statistics, but drops nothing (DINO).
        if not (train and self.drop_path and self.has_rng('drop_path')):
            return y
        keep = 1.0 - self.drop_path
        kept_B11 = jax.random.bernoulli(self.make_rng('drop_path'), keep, (batch, 1, 1))
        images = y.reshape(batch, -1, y.shape[-1])
        return jnp.where(kept_B11, images / keep, 0.0).reshape(y.shape)


class ViT(nn.Module):
    """See `make`."""

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    pool: str
    position: str
    remat: bool
    dtype: jnp.dtype
    drop_path: float = 0.0
    layer_scale: float | None = None
    freeze_patch_embedding: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, mask: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch, height, wide = x.shape[:3]
        if height % self.patch or wide % self.patch or min(height, wide) < 1:
            raise UserError(
                f'config.model: got images of {height} x {wide} pixels and patch={self.patch}; '
                'height and width must be multiples of the patch.'
            )
        rows, columns = height // self.patch, wide // self.patch
        # A convolution of stride P, as one matrix product.
        x = rearrange(x, 'B (h p) (w q) C -> (B h w) (p q C)', p=self.patch, q=self.patch)
        x = self._embed(x).reshape(batch, rows * columns, self.width)
        if mask is not None:
            if mask.shape != x.shape[:2] or mask.dtype != jnp.bool_:
                raise ValueError(
                    f'vit: expected a mask bool{list(x.shape[:2])}, one for each patch; '
                    f'got {mask.dtype}{list(mask.shape)}'
                )
            token = self.param('mask_token', nn.initializers.zeros, (1, 1, self.width))
            x = jnp.where(mask[:, :, None], token.astype(x.dtype), x)

        has_cls = POOLS[self.pool]
        if has_cls:  # std 1e-6: MoCo v3, from timm
            cls = self.param('cls_token', nn.initializers.normal(1e-6), (1, 1, self.width))
            cls = jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self._positions(rows, columns, has_cls).astype(x.dtype)

        # One matrix [B T, D] from here on: XLA on CPU takes half the time over 2-D products.
        x = rearrange(x, 'B T D -> (B T) D')
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        blocks: list[jax.Array] = []
        weights = None
        for i, drop in enumerate(np.linspace(0.0, self.drop_path, self.depth).tolist()):
            x, weights = block(
                self.heads, self.hidden, self.dtype, drop, self.layer_scale, name=f'block{i}'
            )(x, batch, train)
            blocks.append(x)
        norm = nn.LayerNorm(dtype=jnp.float32, name='norm')

        def tokens(x: jax.Array) -> jax.Array:
            return rearrange(norm(x), '(B T) D -> B T D', B=batch)

        def pool(x_BTD: jax.Array) -> jax.Array:
            return x_BTD[:, 0] if has_cls else x_BTD.mean(axis=1)

        x = tokens(x)
        named = {'cls': x[:, 0], 'patches': x[:, 1:]} if has_cls else {'patches': x}
        if weights is not None:
            pooled = [pool(tokens(y)) for y in blocks[:-1]] + [pool(x)]
            named |= {f'block{i}': y for i, y in enumerate(pooled)}
            named['last4'] = jnp.concatenate(pooled[-4:], axis=1)
            weights = weights.astype(jnp.float32)
            named['attention'] = weights[:, :, 0, 1:] if has_cls else weights.mean(axis=2)
        return pool(x), named

    def _embed(self, x: jax.Array) -> jax.Array:
        """The patch projection, [B N, P P C] -> [B N, D]."""
        projection = partial(nn.Dense, self.width, dtype=self.dtype, kernel_init=xavier)
        if not self.freeze_patch_embedding:
            return projection(name='patch_embedding')(x)
        # Not among the parameters, where weight decay would shrink it: it lies beside the running
        # averages, which are kept with a run and copied with a network, but not trained.
        dense: Any = projection(parent=None)

        def start() -> Any:
            return dense.init(self.make_rng('params'), x)['params']

        frozen = self.variable('batch_stats', 'patch_embedding', start)
        return dense.apply({'params': frozen.value}, x)

    def _positions(self, rows: int, columns: int, has_cls: bool) -> jax.Array:
        if self.position == 'sincos2d':
            fixed = sincos2d(rows, columns, self.width)
            return jnp.asarray(np.pad(fixed, ((int(has_cls), 0), (0, 0)))[None])  # CLS gets zeros
        shape = (1, rows * columns + has_cls, self.width)
        name = 'position_embedding'
        if not self.has_variable('params', name):
            return self.param(name, nn.initializers.normal(0.02), shape)
        table = self.get_variable('params', name)  # `param` takes no other shape
        return table if table.shape == shape else resample(table, rows, columns, has_cls)


def resample(table: jax.Array, rows: int, columns: int, has_cls: bool) -> jax.Array:
    """Learned positions of a square grid for another one, bicubic; CLS keeps its own.

    Args:
        table: [1, T, D], of T = S * S patches in row-major order, after that of CLS if has_cls.
        rows, columns: patches in the grid.
        has_cls: whether there is a CLS token.

    Returns:
        [1, rows * columns + has_cls, D].

    Raises:
        UserError: a table of another number of patches.

    Source: DINO (Caron et al. 2021, arXiv:2104.14294), whose small crops see them so; like it
    without a low-pass filter, because the embeddings of neighbours are smooth.
    """
    first, patches = table[:, : int(has_cls)], table[:, int(has_cls) :]
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise UserError(
            f'config.model.position: got images of {rows} x {columns} patches, but learned the '
            f'positions of {patches.shape[1]}; only those of a square grid can be resampled.'
        )
    grid = patches.reshape(1, side, side, -1)
    shape = (1, rows, columns, grid.shape[-1])
    grid = jax.image.resize(grid, shape, 'bicubic', antialias=False)
    return jnp.concatenate([first, grid.reshape(1, rows * columns, -1)], axis=1)


def make(
    *,
    size: str = 'custom',
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    patch: int = 16,
    pool: str = 'cls',
    position: str = 'sincos2d',
    mlp_ratio: float = 4.0,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    freeze_patch_embedding: bool = False,
    remat: bool = False,
    dtype: str = 'float32',
) -> ViT:
    """A ViT for images whose height and width are multiples of `patch`, square or not.

    Called as `module(x_BHWC, train, mask)`, it returns features [B, D] after the final LayerNorm
    and `{'patches': [B, N, D]}`, with `'cls': [B, D]` too if pool is 'cls'; all float32. With
    train=False there are also 'block0', 'block1', ... [B, D], what is pooled after each block and
    the final LayerNorm; 'last4' [B, 4 D], those of the last four blocks (DINO's linear probe); and
    'attention' [B, K, N], the weights that the patches get in each head of the last block, from
    CLS, or without one on the average of the patches.

    A mask, bool [B, N], is optional: where it is True a learned token, which starts at zero, takes
    the place of the patch, before positions are added (BEiT, Bao et al. 2022, arXiv:2106.08254;
    DINOv2, Oquab et al. 2024, arXiv:2304.07193). Only a module that is given one at
    initialisation has the token.

    Args:
        size: 'Ti', 'S', 'B', 'L', or 'custom', which needs width, depth and heads.
        width, depth, heads: set, they replace those of `size` (MoCo v3's ViT-S has 12 heads).
            width is a multiple of heads, and of 4 with sincos2d.
        patch: side of a patch in pixels, at least 1.
        pool: 'cls' (features are the CLS token) or 'mean' (of the patches; there is no CLS token).
        position: 'sincos2d' (fixed, see `sincos2d`; zeros for CLS; smaller images have the first
            rows and columns of larger ones), or 'learned' (initialised at 0.02, one for each patch
            of the first images; those of a square grid are resampled for images of another number
            of patches, see `resample`).
        mlp_ratio: hidden width of the MLP over width, above 0.
        drop_path: stochastic depth (Huang et al. 2016, arXiv:1603.09382): in training each image
            skips each of the last block's two branches with this probability, in [0, 1), and what
            it does not skip is scaled so that the expectation is the same; linear from 0 at the
            first block. Only with a key for `models.apply`: without one nothing is skipped, as
            DINO's teacher skips nothing.
        layer_scale: initial value, above 0, of a learned factor for each channel of each branch
            (CaiT, Touvron et al. 2021, arXiv:2103.17239, eq. 3: 0.1 to 1e-6); None: no such factor.
        freeze_patch_embedding: the patch projection stays as it was initialised, which keeps ViTs
            stable (MoCo v3, section 4.1). It is then in the module's stats, not in its params:
            no gradient, no weight decay, no target network moves it.
        remat: keep no activations within a block but compute them again for the gradient: less
            memory, a third more time.
        dtype: of the computation, 'float32' or 'bfloat16'. Parameters, softmax, the statistics of
            LayerNorm and the results are float32 in both.

    Raises:
        UserError: a value outside those, or (when called) images that do not divide into patches
            or whose learned positions cannot be resampled.
        ValueError: (when called) a mask that is not bool [B, N].

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929; initialisation of MoCo v3 (Chen et al. 2021,
    arXiv:2104.02057).
    """
    where = 'config.model'
    given = {'width': width, 'depth': depth, 'heads': heads}
    shape: dict[str, int] = dict(choose('size', size, SIZES, where))
    shape |= {k: v for k, v in given.items() if v is not None}
    for key in given:
        if key not in shape:
            raise UserError(f'{where}: size={size!r} needs the key {key!r}, which is not set.')
    numbers = shape | {'patch': patch, 'mlp_ratio': mlp_ratio}
    numbers |= {} if layer_scale is None else {'layer_scale': layer_scale}
    for key, value in numbers.items():
        if value <= 0:
            raise UserError(f'{where}.{key}: got {value}; expected more than 0.')
    if not 0 <= drop_path < 1:
        raise UserError(f'{where}.drop_path: got {drop_path}; expected at least 0 and below 1.')
    width, heads = shape['width'], shape['heads']
    choose('position', position, dict.fromkeys(POSITIONS), where)
    choose('pool', pool, POOLS, where)
    if width % heads:
        raise UserError(f'{where}: got width={width}, heads={heads}; heads must divide width.')
    if position == 'sincos2d' and width % 4:
        raise UserError(f"{where}: got width={width}; position='sincos2d' needs a multiple of 4.")
    return ViT(
        width=width,
        depth=shape['depth'],
        heads=heads,
        hidden=round(width * mlp_ratio),
        patch=patch,
        pool=pool,
        position=position,
        remat=remat,
        dtype=choose('dtype', dtype, DTYPES, where),
        drop_path=drop_path,
        layer_scale=layer_scale,
        freeze_patch_embedding=freeze_patch_embedding,
    )
