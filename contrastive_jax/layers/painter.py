"""A decoder that paints holes, and a critic that tells what it painted from what was there.

Pathak et al. 2016, arXiv:1604.07379, sections 3.1 and 3.2, and their code.

Dimension key: B batch, N places of a map, D channels, h w map, S side of what is painted, M places
of the map that painting begins with, C channels of an image.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax.config import UserError
from contrastive_jax.layers.convolution import SLOPE, Down, Up, dcgan_start
from contrastive_jax.layers.norm import batch_norm

SMALLEST = 4  # side of the map that painting begins with and a critic ends with, about


def halvings(side: int) -> int:
    """Times, from 1, that an even side is halved, until it is odd or at most SMALLEST.

    >>> halvings(64), halvings(12), halvings(4)
    (4, 2, 1)
    """
    count = 1
    while side // 2**count > SMALLEST and side // 2**count % 2 == 0:
        count += 1
    return count


def widths(width: int, count: int) -> tuple[int, ...]:
    """Channels of `count` maps, from the largest: they double over the last three.

    >>> widths(64, 5), widths(64, 2)
    ((64, 64, 128, 256, 512), (64, 128))
    """
    most = min(count, 4) - 1
    return tuple(width * 2 ** max(0, i + 1 + most - count) for i in range(count))


class ChannelWise(nn.Module):
    """A fully connected layer of each channel by itself (section 3.1): everything moves in space.

    Attributes:
        out: M.
    """

    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, M, D]."""
        lecun = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        kernel = self.param('kernel', lecun, (x.shape[2], x.shape[1], self.out))
        return jnp.einsum('BND,DNM->BMD', x, kernel)


class Painter(nn.Module):
    """A decoder from an encoder's map to pixels in [−1, 1]: tanh.

    Authors' code: convolutions have biases that are set to 0 before every step; here: none.

    Attributes:
        side: S, even.
        channels: C.
        width: channels of the largest map; smaller ones have up to eight times as many.
        bottleneck: numbers that the whole map is made into, as in the authors' code; 0: each
            channel has a fully connected layer of its own, as in the paper.
    """

    side: int
    channels: int
    width: int
    bottleneck: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, N, D] -> [B, S, S, C], float32."""

        def dense(out: int, name: str) -> nn.Dense:
            return nn.Dense(out, use_bias=False, kernel_init=dcgan_start, name=name)

        count = halvings(self.side)
        first = self.side // 2**count
        *rest, top = widths(self.width, count)
        x = x.astype(jnp.float32)
        if self.bottleneck:
            x = dense(self.bottleneck, 'bottleneck')(x.reshape(len(x), -1))
            x = nn.leaky_relu(batch_norm(train, name='bottleneck_norm')(x), SLOPE)
            x = dense(first * first * top, 'spread')(x)
        else:
            x = ChannelWise(first * first, name='bottleneck')(x)
            x = dense(top, 'mix')(x)
        x = nn.relu(batch_norm(train, name='norm0')(x.reshape(len(x), first, first, top)))
        for i, width in enumerate(reversed(rest), 1):
            x = nn.relu(batch_norm(train, name=f'norm{i}')(Up(width, name=f'up{i}')(x)))
        return jnp.tanh(Up(self.channels, name='out')(x))


class Critic(nn.Module):
    """DCGAN's discriminator, whose first convolution has no BatchNorm.

    Attributes:
        width: channels of the largest map; smaller ones have up to eight times as many.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, S, S, C] -> logits [B], above 0: these pixels are true ones; float32."""
        for i, width in enumerate(widths(self.width, halvings(x.shape[1])), 1):
            x = Down(width, i > 1, name=f'block{i}')(x, train)
        flat = x.reshape(len(x), -1)
        return nn.Dense(1, use_bias=False, kernel_init=dcgan_start, name='out')(flat)[:, 0]


def places(named: dict[str, jax.Array]) -> jax.Array:
    """An encoder's map as [B, N, D].

    Raises:
        UserError: it has none.
    """
    cells, patches = named.get('map'), named.get('patches')
    if cells is not None:
        return rearrange(cells, 'B h w D -> B (h w) D')
    if patches is not None:
        return patches
    raise UserError(
        "config.model: context_encoder needs one that gives 'map' or 'patches'; the outputs of "
        f'this one are {tuple(named)}.'
    )
