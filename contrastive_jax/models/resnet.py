"""ResNet v1.5 (He et al. 2016, arXiv:1512.03385; stride on the 3 x 3 as in torchvision).

Dimension key: B batch, H W image, C channels, h w map, D features.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax.config import UserError, check_range, choose
from contrastive_jax.layers.convolution import Conv
from contrastive_jax.layers.norm import batch_norm

SIZES = {  # He et al. 2016, table 1
    '18': {'widths': (64, 128, 256, 512), 'blocks': (2, 2, 2, 2), 'block': 'basic'},
    '34': {'widths': (64, 128, 256, 512), 'blocks': (3, 4, 6, 3), 'block': 'basic'},
    '50': {'widths': (64, 128, 256, 512), 'blocks': (3, 4, 6, 3), 'block': 'bottleneck'},
    '101': {'widths': (64, 128, 256, 512), 'blocks': (3, 4, 23, 3), 'block': 'bottleneck'},
    'custom': {},
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
STEMS = {  # side, stride, padding, max-pool?
    'imagenet': (7, 2, 3, True),
    'cifar': (3, 1, 1, False),
    'patch4': (4, 2, 1, False),
    'patch': (4, 4, 0, False),
}
BLOCKS = ('basic', 'bottleneck')


class Block(nn.Module):
    """Basic (3x3, 3x3) or bottleneck (1x1, 3x3 with the stride, 1x1 to 4 times the width)."""

    width: int
    stride: int
    bottleneck: bool
    zero_init_last: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(batch_norm, train, dtype=self.dtype)
        out = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (out, 3, 1)]
        y = x
        for i, (width, side, stride) in enumerate(layers, 1):
            y = Conv(width, side, stride, side // 2, self.dtype, name=f'conv{i}')(y)
            last = i == len(layers)
            zero = last and self.zero_init_last
            y = norm(
                scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
                name=f'norm{i}',
            )(y)
            if not last:
                y = nn.relu(y)
        if x.shape != y.shape:
            x = Conv(out, 1, self.stride, 0, self.dtype, name='shortcut')(x)
            x = norm(name='shortcut_norm')(x)
        return nn.relu(x + y)


class AttentionPool(nn.Module):
    """The places of a map, as their mean attends to them (CLIP, Radford et al. 2021, section 2.4).

    Heads are 64 wide. Paper: a linear layer follows; here: the projection into the shared space is
    that layer.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, D] float32 -> [B, D]."""
        width = x.shape[-1]
        x = rearrange(x, 'B h w D -> B (h w) D')
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        start = nn.initializers.normal(width**-0.5)
        x = x + self.param('position_embedding', start, (1, *x.shape[1:]))
        heads = max(1, width // 64)
        q = nn.Dense(width, name='query')(x[:, 0]) * (width // heads) ** -0.5
        q = rearrange(q, 'B (K F) -> B K F', K=heads)
        k = nn.Dense(width, use_bias=False, name='key')(x)  # softmax takes no notice of a bias
        k = rearrange(k, 'B T (K F) -> B T K F', K=heads)
        v = rearrange(nn.Dense(width, name='value')(x), 'B T (K F) -> B T K F', K=heads)
        weights = jax.nn.softmax(jnp.einsum('BKF,BTKF->BKT', q, k), axis=-1)
        return rearrange(jnp.einsum('BKT,BTKF->BKF', weights, v), 'B K F -> B (K F)')


class ResNet(nn.Module):
    """See `make`."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    block: str
    stem: str
    pool: str
    zero_init_last: bool
    remat: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        side, stride, padding, pool = STEMS[self.stem]
        x = Conv(self.widths[0], side, stride, padding, self.dtype, name='stem')(x)
        x = nn.relu(batch_norm(train, dtype=self.dtype, name='stem_norm')(x))
        if pool:
            # Padded here, because max_pool's own type says that its padding is a str.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # 0: no more than a ReLU's outputs
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
        block = nn.remat(Block, static_argnums=2) if self.remat else Block
        stages: list[jax.Array] = []
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True), 1):
            for i in range(count):
                x = block(
                    width,
                    stride=2 if stage > 1 and i == 0 else 1,
                    bottleneck=self.block == 'bottleneck',
                    zero_init_last=self.zero_init_last,
                    dtype=self.dtype,
                    name=f'stage{stage}_block{i}',
                )(x, train)
            stages.append(x)
        x = x.astype(jnp.float32)
        pooled = AttentionPool(name='pool')(x) if self.pool == 'attention' else x.mean(axis=(1, 2))
        maps = [] if train else [y.astype(jnp.float32) for y in stages[:-1]]
        return pooled, {**{f'stage{i}': y for i, y in enumerate(maps, 1)}, 'map': x}


def make(
    *,
    size: int | str = 'custom',
    widths: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    block: str | None = None,
    stem: str = 'imagenet',
    pool: str = 'mean',
    zero_init_last: bool = True,
    remat: bool = False,
    dtype: str = 'float32',
) -> ResNet:
    """A ResNet without its classifier.

    Called as `module(x_BHWC, train)`, it returns the globally pooled features [B, D] and
    `{'map': [B, h, w, D]}`, float32; D is the last width, times 4 with bottleneck blocks. With
    train=False there are also the maps after the other stages, 'stage1', 'stage2', ... With
    train=True BatchNorm takes its statistics over the whole batch that the module is called on:
    the global batch under jit, however the batch is sharded. Running averages have momentum 0.9
    (torch calls it 0.1).

    Args:
        size: 18, 34, 50, 101, or 'custom', which needs widths and blocks.
        widths: channels of each stage (a bottleneck's inner width); the first is the stem's too.
        blocks: blocks in each stage; every stage but the first begins with stride 2.
        block: 'basic' or 'bottleneck'; 'basic' where size is 'custom' and it is not set.
            widths, blocks and block, where set, replace those of `size`.
        stem: 'imagenet' (7x7 stride 2, then 3x3 max-pool stride 2), 'cifar' (3x3 stride 1; SimCLR,
            appendix B.9) 'patch4' (4x4 stride 2: ours, a quarter of the work of 'cifar')
            or 'patch' (4x4 stride 4).
        pool: 'mean', or 'attention' as CLIP's ResNets, for images of one size; D must be a multiple
            of 64 where it is more.
        zero_init_last: start each block as the identity: scale 0 in its last BatchNorm (Goyal et
            al. 2017, arXiv:1706.02677, section 5.1). The block's other parameters then get no
            gradient in the first step.
        remat: keep no activations within a block but compute them again for the gradient: less
            memory, a third more time.
        dtype: of the computation, 'float32' or 'bfloat16'. Parameters, batch statistics and the
            results are float32 in both.

    Raises:
        UserError: a value outside those.

    Source: He et al. 2016, arXiv:1512.03385; initialisation He et al. 2015 (normal, fan-out).
    """
    where = 'config.model'
    shape = dict(choose('size', str(size), SIZES, where))
    shape |= {k: tuple(v) for k, v in (('widths', widths), ('blocks', blocks)) if v is not None}
    shape['block'] = block or shape.get('block', 'basic')
    for key in ('widths', 'blocks'):
        if key not in shape:
            raise UserError(f'{where}: size={size!r} needs the key {key!r}, which is not set.')
        numbers = {f'{key}[{i}]': number for i, number in enumerate(shape[key])}
        check_range(where, numbers, least=1, whole=True)
    if not shape['widths'] or len(shape['widths']) != len(shape['blocks']):
        raise UserError(
            f'{where}: got widths={shape["widths"]}, blocks={shape["blocks"]}; '
            'expected one of each for every stage.'
        )
    choose('block', shape['block'], dict.fromkeys(BLOCKS), where)
    choose('stem', stem, STEMS, where)
    choose('pool', pool, dict.fromkeys(('mean', 'attention')), where)
    last = shape['widths'][-1] * (4 if shape['block'] == 'bottleneck' else 1)
    if pool == 'attention' and last > 64 and last % 64:
        raise UserError(f"{where}: got {last} features; pool='attention' needs a multiple of 64.")
    return ResNet(
        **shape,
        stem=stem,
        pool=pool,
        zero_init_last=zero_init_last,
        remat=remat,
        dtype=choose('dtype', dtype, DTYPES, where),
    )
