"""Convolutions that are quick on CPUs, too, and the strided ones that DCGANs are made of.

Dimension key: B batch, H W image, C D channels, P side of a kernel.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax.layers.norm import batch_norm
from contrastive_jax.similarity.mesh import device_count

LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=LAYOUT
        )

    if min(x.shape[1:3]) >= kernel.shape[0]:
        return plain(x, kernel)

    # XLA has no fast convolution of maps smaller than the kernel on a CPU.
    def product(x, kernel):
        patches = jnp.concatenate(_patches(x, len(kernel), stride, padding), axis=-1)
        return patches @ kernel.reshape(-1, kernel.shape[-1])

    return jax.lax.platform_dependent(x, kernel, cpu=product, default=plain)


def _patches(x: jax.Array, side: int, stride: int, padding: int) -> list[jax.Array]:
    """For each of the kernel's places, the inputs [B, H', W', C] that it meets."""
    rows, columns = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    last = [rows + 2 * padding - side + 1, columns + 2 * padding - side + 1]
    return [
        x[:, p : p + last[0] : stride, q : q + last[1] : stride]
        for p in range(side)
        for q in range(side)
    ]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """2-D convolution with a kernel gradient that is quick on CPUs too; reverse mode only.

    Args:
        x: [B, H, W, C].
        kernel: [P, P, C, D], of x's dtype.
        stride, padding: of both axes; the padding is on both sides, as in torch, so that weights
            can be exchanged (at stride 2, SAME is not).
    """
    return _convolve(x, kernel, stride, padding)


def _forward(x, kernel, stride, padding):
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, saved, d_out):
    x, kernel = saved
    _, to_x = jax.vjp(lambda x: _convolve(x, kernel, stride, padding), x)

    def plain(x, d_out):
        return jax.vjp(lambda k: _convolve(x, k, stride, padding), kernel)[1](d_out)[0]

    # On a CPU XLA's kernel gradient is far slower than its convolution and would be most of a
    # training step. Elsewhere XLA's own.
    tiled = partial(_kernel_gradient, side=kernel.shape[0], stride=stride, padding=padding)
    return *to_x(d_out), jax.lax.platform_dependent(x, d_out, cpu=tiled, default=plain)


def _kernel_gradient(x, d_out, side, stride, padding):
    """patches^T @ d_out, over a few images at a time so that their patches stay in the cache."""
    # Every device adds up its own images' share, and the shares meet after the loop: once instead
    # of once a turn, and because XLA's CPU runtime can hang on a collective within a loop.
    devices = math.gcd(len(x), device_count())
    x, d_out = (y.reshape(devices, -1, *y.shape[1:]) for y in (x, d_out))
    batch, rows, columns, width = d_out.shape[1:]
    channels = x.shape[-1]
    most = max(4, 2**16 // (rows * columns * channels)) // devices
    images = max(n for n in range(1, min(batch, max(1, most)) + 1) if batch % n == 0)

    def share(x, d_out):
        x = x.reshape(images, batch // images, *x.shape[1:])
        d_out = d_out.reshape(images, batch // images, rows * columns, width)

        def add(total, i):
            one = jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
            patches = [p.reshape(-1, channels) for p in _patches(one, side, stride, padding)]
            patches_NP = jnp.concatenate(patches, axis=1)
            d_one = jax.lax.dynamic_index_in_dim(d_out, i, axis=1, keepdims=False)
            d_ND = d_one.reshape(-1, width)
            # [D, P], whose rows are long, takes a CPU less time than [P, D].
            product_DP = jnp.einsum(
                'ND,NP->DP', d_ND, patches_NP, preferred_element_type=jnp.float32
            )
            return total + product_DP, None

        start = jnp.zeros((width, side * side * channels), jnp.float32)
        return jax.lax.scan(add, start, jnp.arange(batch // images))[0]

    total_DP = jax.vmap(share)(x, d_out).sum(0)
    return total_DP.T.reshape(side, side, channels, width).astype(x.dtype)


convolve.defvjp(_forward, _backward)


class Conv(nn.Module):
    """Square convolution without a bias, which the BatchNorm after it would take away."""

    out: int
    side: int
    stride: int
    padding: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        he = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
        kernel = self.param('kernel', he, (self.side, self.side, x.shape[-1], self.out))
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)


# DCGAN's (Radford et al. 2016, arXiv:1511.06434).
SLOPE = 0.2  # of LeakyReLU below 0
dcgan_start = nn.initializers.normal(0.02)  # of kernels


class Down(nn.Module):
    """A convolution 4 x 4 of stride 2 and padding 1, BatchNorm if it is wanted, LeakyReLU.

    Attributes:
        out: D.
        norm: whether there is a BatchNorm.
        dtype: of the computation.
    """

    out: int
    norm: bool
    dtype: jnp.dtype = jnp.dtype('float32')

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H / 2, W / 2, D], rounded down."""
        kernel = self.param('kernel', dcgan_start, (4, 4, x.shape[-1], self.out))
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), 2, 1)
        x = batch_norm(train, dtype=self.dtype, name='norm')(x) if self.norm else x
        return nn.leaky_relu(x, SLOPE)


class Up(nn.Module):
    """A transposed convolution 4 x 4 of stride 2 and padding 1.

    As a convolution 2 x 2 that gives four pixels at each place, which CPUs compute faster.

    Attributes:
        out: D.
    """

    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2 H, 2 W, D]."""
        kernel = self.param('kernel', dcgan_start, (2, 2, x.shape[-1], 4 * self.out))
        x = convolve(x, kernel, 1, 1)
        x = rearrange(x, 'B H W (p q D) -> B (H p) (W q) D', p=2, q=2)
        return x[:, 1:-1, 1:-1]
