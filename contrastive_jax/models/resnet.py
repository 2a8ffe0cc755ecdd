"""ResNet v1.5 (He et al. 2016, arXiv:1512.03385; stride on the 3 x 3 as in torchvision).

Dimension key: B batch, H W image, C channels, h w map, D features.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax.config import UserError, choose

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
}
BLOCKS = ('basic', 'bottleneck')


def _conv(out: int, side: int, stride: int, padding: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    # Padding is symmetric as in torch, so that weights can be exchanged: at stride 2, SAME is not.
    return nn.Conv(
        out,
        (side, side),
        strides=stride,
        padding=padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
        name=name,
    )


class Block(nn.Module):
    """Basic (3x3, 3x3) or bottleneck (1x1, 3x3 with the stride, 1x1 to 4 times the width)."""

    width: int
    stride: int
    bottleneck: bool
    zero_init_last: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        out = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (out, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (out, 3, 1)]
        y = x
        for i, (width, side, stride) in enumerate(layers, 1):
            y = _conv(width, side, stride, side // 2, self.dtype, f'conv{i}')(y)
            last = i == len(layers)
            zero = last and self.zero_init_last
            y = norm(
                scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
                name=f'norm{i}',
            )(y)
            if not last:
                y = nn.relu(y)
        if x.shape != y.shape:
            x = _conv(out, 1, self.stride, 0, self.dtype, 'shortcut')(x)
            x = norm(name='shortcut_norm')(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """See `make`."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    block: str
    stem: str
    zero_init_last: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        side, stride, padding, pool = STEMS[self.stem]
        x = _conv(self.widths[0], side, stride, padding, self.dtype, 'stem')(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            name='stem_norm',
        )(x)
        x = nn.relu(x)
        if pool:
            # Padded here, because max_pool's own type says that its padding is a str.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # 0: no more than a ReLU's outputs
            x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True), 1):
            for i in range(count):
                x = Block(
                    width,
                    stride=2 if stage > 1 and i == 0 else 1,
                    bottleneck=self.block == 'bottleneck',
                    zero_init_last=self.zero_init_last,
                    dtype=self.dtype,
                    name=f'stage{stage}_block{i}',
                )(x, train)
        x = x.astype(jnp.float32)
        return x.mean(axis=(1, 2)), {'map': x}


def make(
    *,
    size: int | str = 'custom',
    widths: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    block: str | None = None,
    stem: str = 'imagenet',
    zero_init_last: bool = True,
    dtype: str = 'float32',
) -> ResNet:
    """A ResNet without its classifier.

    Called as `module(x_BHWC, train)`, it returns the globally average-pooled features [B, D] and
    `{'map': [B, h, w, D]}`, float32. D is the last width, times 4 with bottleneck blocks. With
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
            appendix B.9) or 'patch4' (4x4 stride 2: ours, a quarter of the work of 'cifar').
        zero_init_last: start each block as the identity: scale 0 in its last BatchNorm (Goyal et
            al. 2017, arXiv:1706.02677, section 5.1). The block's other parameters then get no
            gradient in the first step.
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
        if not shape[key] or min(shape[key]) < 1:
            raise UserError(f'{where}.{key}: got {shape[key]}; expected numbers of at least 1.')
    if len(shape['widths']) != len(shape['blocks']):
        raise UserError(
            f'{where}: got widths={shape["widths"]}, blocks={shape["blocks"]}; '
            'expected one of each for every stage.'
        )
    choose('block', shape['block'], dict.fromkeys(BLOCKS), where)
    choose('stem', stem, STEMS, where)
    return ResNet(
        **shape,
        stem=stem,
        zero_init_last=zero_init_last,
        dtype=choose('dtype', dtype, DTYPES, where),
    )
