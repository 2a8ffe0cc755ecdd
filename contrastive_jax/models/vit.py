"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): pre-norm, any image size.

Dimension key: B batch, H W image, C channels, P patch, N patches, T tokens (N and what is before
them), D width, K heads.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from contrastive_jax.config import UserError, check_range, choose
from contrastive_jax.layers.blocks import ACTIVATIONS, MAP, Block, sincos2d, xavier, xavier_qkv

SIZES = {  # Touvron et al. 2021 (Ti, S), Dosovitskiy et al. 2021 table 1 (B, L)
    'Ti': {'width': 192, 'depth': 12, 'heads': 3},
    'S': {'width': 384, 'depth': 12, 'heads': 6},
    'B': {'width': 768, 'depth': 12, 'heads': 12},
    'L': {'width': 1024, 'depth': 24, 'heads': 16},
    'custom': {},
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
POOLS = {'cls': True, 'mean': False, 'cls_mean': True, 'map': False}  # needs a CLS token?
POSITIONS = ('sincos2d', 'learned')
STARTS = {  # of q, k and v, and the standard deviation of CLS (MoCo v3: from timm)
    'moco_v3': (xavier_qkv, 1e-6),
    'mae': (xavier, 0.02),
}


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
    drop_path_uniform: bool = False
    layer_scale: float | None = None
    freeze_patch_embedding: bool = False
    activation: str = 'gelu_tanh'
    epsilon: float = 1e-6
    norm_pre: bool = False
    patch_bias: bool = True
    registers: int = 0
    cls_token: bool = True
    start: str = 'moco_v3'

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        mask: jax.Array | None = None,
        keep: jax.Array | None = None,
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

        has_cls = self.cls_token
        qkv_init, std = STARTS[self.start]
        if has_cls:
            cls = self.param('cls_token', nn.initializers.normal(std), (1, 1, self.width))
            cls = jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self._positions(rows, columns, has_cls).astype(x.dtype)
        if keep is not None:
            if len(keep) != batch or keep.ndim != 2 or keep.dtype != jnp.int32:
                raise ValueError(
                    f'vit: expected patches to keep, int32[{batch}, n]; '
                    f'got {keep.dtype}{list(keep.shape)}'
                )
            kept = jnp.take_along_axis(x[:, int(has_cls) :], keep[:, :, None], axis=1)
            x = jnp.concatenate([x[:, : int(has_cls)], kept], axis=1)
        first = has_cls + self.registers  # of the patches
        if self.registers:
            start = nn.initializers.normal(1e-6)
            more = self.param('register_tokens', start, (1, self.registers, self.width))
            more = jnp.broadcast_to(more.astype(x.dtype), (batch, *more.shape[1:]))
            x = jnp.concatenate([x[:, : int(has_cls)], more, x[:, int(has_cls) :]], axis=1)

        # One matrix [B T, D] from here on: on a CPU XLA is fastest over 2-D products.
        x = rearrange(x, 'B T D -> (B T) D')
        layer_norm = partial(nn.LayerNorm, epsilon=self.epsilon)
        if self.norm_pre:
            x = layer_norm(dtype=self.dtype, name='norm_pre')(x)
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        blocks: list[jax.Array] = []
        weights = None
        first_drop = self.drop_path if self.drop_path_uniform else 0.0
        for i, drop in enumerate(np.linspace(first_drop, self.drop_path, self.depth).tolist()):
            x, weights = block(
                self.heads,
                self.hidden,
                self.dtype,
                drop,
                self.layer_scale,
                self.activation,
                self.epsilon,
                qkv_init,
                name=f'block{i}',
            )(x, batch, train)
            blocks.append(x)
        norm = layer_norm(dtype=jnp.float32, name='norm')

        def tokens(x: jax.Array) -> jax.Array:
            return rearrange(norm(x), '(B T) D -> B T D', B=batch)

        def pool(x_BTD: jax.Array) -> jax.Array:
            if self.pool == 'cls':
                return x_BTD[:, 0]
            mean_BD = x_BTD[:, first:].mean(axis=1)
            both = self.pool == 'cls_mean'
            return jnp.concatenate([x_BTD[:, 0], mean_BD], axis=1) if both else mean_BD

        x = tokens(x)
        features, named = pool(x), {'patches': x[:, first:]}
        if has_cls:
            named['cls'] = x[:, 0]
        if self.pool == 'map':
            probe = MAP(self.heads, self.hidden, self.activation, self.epsilon, name='pool')
            features = probe(named['patches'])
        if weights is not None:
            pooled = [pool(tokens(y)) for y in blocks[:-1]] + [features]
            named |= {f'block{i}': y for i, y in enumerate(pooled)}
            named['last4'] = jnp.concatenate(pooled[-4:], axis=1)
            weights = weights.astype(jnp.float32)
            of_cls = weights[:, :, 0, first:]
            named['attention'] = of_cls if has_cls else weights[:, :, first:, first:].mean(axis=2)
        return features, named

    def _embed(self, x: jax.Array) -> jax.Array:
        """The patch projection, [B N, P P C] -> [B N, D]."""
        projection = partial(
            nn.Dense, self.width, self.patch_bias, dtype=self.dtype, kernel_init=xavier
        )
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
    drop_path_uniform: bool = False,
    layer_scale: float | None = None,
    freeze_patch_embedding: bool = False,
    activation: str = 'gelu_tanh',
    epsilon: float = 1e-6,
    norm_pre: bool = False,
    patch_bias: bool = True,
    registers: int = 0,
    cls_token: bool | None = None,
    start: str = 'moco_v3',
    remat: bool = False,
    dtype: str = 'float32',
) -> ViT:
    """A ViT for images whose height and width are multiples of `patch`, square or not.

    Called as `module(x_BHWC, train, mask, keep)`, it returns features [B, D] after the final
    LayerNorm and `{'patches': [B, N, D]}`, with `'cls': [B, D]` too where there is a CLS token; all
    float32.
    With train=False there are also 'block0', 'block1', ... [B, D], what is pooled after each block
    and the final LayerNorm (with 'map' the patches' mean, but for the last); 'last4' [B, 4 D],
    those of the last four blocks (DINO's linear probe); and 'attention' [B, K, N], the weights that
    the patches get in each head of the last block, from CLS, or without one on the average of the
    patches.

    A mask, bool [B, N], is optional: where it is True a learned token, which starts at zero, takes
    the place of the patch, before positions are added (BEiT, Bao et al. 2022, arXiv:2106.08254;
    DINOv2, Oquab et al. 2024, arXiv:2304.07193). Only a module that is given one at
    initialisation has the token.

    Patches to keep, int32 [B, n], are optional, too: the others are left out once positions are
    added, and cost nothing (MAE, He et al. 2022, arXiv:2111.06377). Outputs are then of those that
    are kept, N = n, in their order there.

    Args:
        size: 'Ti', 'S', 'B', 'L', or 'custom', which needs width, depth and heads.
        width, depth, heads: set, they replace those of `size` (MoCo v3's ViT-S has 12 heads).
            width is a multiple of heads, and of 4 with sincos2d.
        patch: side of a patch in pixels, at least 1.
        pool: what features are: the 'cls' token; the 'mean' of the patches; 'cls_mean', the one
            behind the other [B, 2 D] (DINOv2's linear probe); or 'map', what a learned probe
            attends to among the patches, see `MAP` (SigLIP).
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
        drop_path_uniform: the same probability in every block instead (DINOv2's code).
        layer_scale: initial value, above 0, of a learned factor for each channel of each branch
            (CaiT, Touvron et al. 2021, arXiv:2103.17239, eq. 3: 0.1 to 1e-6); None: no such factor.
        freeze_patch_embedding: the patch projection stays as it was initialised, which keeps ViTs
            stable (MoCo v3, section 4.1). It is then in the module's stats, not in its params:
            no gradient, no weight decay, no target network moves it.
        activation: 'gelu_tanh', 'gelu' or 'quick_gelu' (x σ(1.702 x), OpenAI's CLIP). Paper: exact
            GELU; here by default: its tanh form, because exact takes twice as long on a CPU.
        epsilon: of every LayerNorm, above 0.
        norm_pre: a LayerNorm in front of the first block (CLIP).
        patch_bias: whether the patch projection has a bias (CLIP's has none).
        registers: learned tokens [R, D] between CLS and patches, without a position, which no
            output has (Darcet et al. 2024, arXiv:2309.16588).
        cls_token: whether there is a CLS token; None: where `pool` needs one.
        start: initial values of q, k, v and CLS: those of 'moco_v3', where each of the three is a
            matrix of its own and CLS is near 0; or of 'mae', where they are one matrix and CLS has
            a standard deviation of 0.02.
        remat: keep no activations within a block but compute them again for the gradient: less
            memory, a third more time.
        dtype: of the computation, 'float32' or 'bfloat16'. Parameters, softmax, the statistics of
            LayerNorm and the results are float32 in both.

    Raises:
        UserError: a value outside those, or (when called) images that do not divide into patches
            or whose learned positions cannot be resampled.
        ValueError: (when called) a mask that is not bool [B, N]; a keep that is not int32 [B, n].

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929; initialisation, but for `start`, of MoCo v3
    (Chen et al. 2021, arXiv:2104.02057).
    """
    where = 'config.model'
    given = {'width': width, 'depth': depth, 'heads': heads}
    shape: dict[str, int] = dict(choose('size', size, SIZES, where))
    shape |= {k: v for k, v in given.items() if v is not None}
    for key in given:
        if key not in shape:
            raise UserError(f'{where}: size={size!r} needs the key {key!r}, which is not set.')
    factors = {'mlp_ratio': mlp_ratio, 'epsilon': epsilon}
    factors |= {} if layer_scale is None else {'layer_scale': layer_scale}
    check_range(where, factors, above=0)
    check_range(where, shape | {'patch': patch}, least=1, whole=True)
    check_range(where, {'registers': registers}, least=0, whole=True)
    check_range(where, {'drop_path': drop_path}, least=0, below=1)
    width, heads = shape['width'], shape['heads']
    choose('position', position, dict.fromkeys(POSITIONS), where)
    needs_cls = choose('pool', pool, POOLS, where)
    choose('activation', activation, ACTIVATIONS, where)
    choose('start', start, STARTS, where)
    if cls_token is False and needs_cls:
        raise UserError(f'{where}.cls_token: got False; pool={pool!r} needs the token.')
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
        drop_path_uniform=drop_path_uniform,
        layer_scale=layer_scale,
        freeze_patch_embedding=freeze_patch_embedding,
        activation=activation,
        epsilon=epsilon,
        norm_pre=norm_pre,
        patch_bias=patch_bias,
        registers=registers,
        cls_token=needs_cls if cls_token is None else cls_token,
        start=start,
    )
