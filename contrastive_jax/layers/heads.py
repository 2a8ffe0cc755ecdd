"""Heads on top of an encoder's features: they are trained with it and dropped after.

Dimension key: B batch, D features, E output.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax.config import check_range
from contrastive_jax.layers.norm import batch_norm
from contrastive_jax.losses.scores import unit


class MLP(nn.Module):
    """Projection head: (Linear-BN-ReLU) × (layers − 1), then Linear.

    SimCLR v1 (Chen et al. 2020, arXiv:2002.05709, section 2.1) has 2 layers, SimCLR v2 (Chen et
    al. 2020, arXiv:2006.10029, section 2) and MoCo v3 have 3; MoCo v2 has 2 without BatchNorm.
    BatchNorm takes its statistics over the batch that the head is called on: the global batch
    under jit. A Linear that BatchNorm follows has no bias, which BatchNorm would take away.
    Computed in float32 whatever the encoder's dtype.

    Attributes:
        hidden: width of the hidden layers.
        out: width E of the output.
        layers: Linear layers, at least 1.
        batch_norm: BatchNorm in the hidden layers.
        last_batch_norm: BatchNorm after the last Linear too, with a scale and no bias, as
            SimCLR's published code does.
        last_scale: whether that last BatchNorm has its scale; MoCo v3's and SimSiam's have none.
        last_bias: whether the last Linear has a bias, if no BatchNorm follows it.
        activation: 'relu' or 'gelu' (DINO).
        kernel_init: of every Linear.

    Raises:
        UserError: (when called) a number below 1.
    """

    hidden: int
    out: int
    layers: int = 2
    batch_norm: bool = True
    last_batch_norm: bool = False
    last_scale: bool = True
    last_bias: bool = True
    activation: str = 'relu'
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, D] -> [B, E], float32, not normalised."""
        sizes = {'hidden': self.hidden, 'out': self.out, 'layers': self.layers}
        check_range('head', sizes, least=1, whole=True)
        x = x.astype(jnp.float32)
        for i in range(1, self.layers + 1):
            last = i == self.layers
            norm = self.last_batch_norm if last else self.batch_norm
            bias = not norm and (self.last_bias or not last)
            out = self.out if last else self.hidden
            x = nn.Dense(out, bias, kernel_init=self.kernel_init, name=f'linear{i}')(x)
            if norm:
                scale = not last or self.last_scale
                x = batch_norm(train, use_bias=not last, use_scale=scale, name=f'norm{i}')(x)
            if not last:
                x = nn.relu(x) if self.activation == 'relu' else nn.gelu(x)
        return x


class Hidden(nn.Module):
    """Linear, BatchNorm and ReLU: a hidden layer of `MLP` by itself.

    Attributes:
        out: width E of the output.
    """

    out: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, D] -> [B, E], float32, not negative."""
        x = nn.Dense(self.out, use_bias=False, name='linear')(x.astype(jnp.float32))
        return nn.relu(batch_norm(train, name='norm')(x))


class Classifier(nn.Module):
    """A linear classifier; one that starts at 0 takes every class for as likely as the others.

    Attributes:
        classes: C.
        std: of the kernel's normal distribution at the start; 0: none.
        batch_norm: BatchNorm without scale and bias on the features (MAE's linear probe).
    """

    classes: int
    std: float = 0.0
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, D] -> logits [B, C], float32."""
        x = x.astype(jnp.float32)
        if self.batch_norm:
            plain = {'use_bias': False, 'use_scale': False}
            x = batch_norm(train, epsilon=1e-6, **plain, name='norm')(x)  # features may be small
        init = nn.initializers.normal(self.std) if self.std else nn.initializers.zeros
        return nn.Dense(self.classes, kernel_init=init, name='linear')(x)


class Prototypes(nn.Module):
    """Scores with K learned directions: SwAV's prototypes (Caron et al. 2020, section 3.1) and the
    last layer of DINO's head, a weight norm (Caron et al. 2021, section 3.1).

    Attributes:
        count: K.
        learn_length: whether each direction has a length that is learned, from 1. Without one
            scores are cosines.
        kernel_init: of the directions, whose length matters to the optimiser alone.
    """

    count: int
    learn_length: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()  # of length 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, D] -> [B, K], float32."""
        del train
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.count))
        scores = unit(x) @ unit(kernel.T).T
        if self.learn_length:
            scores = scores * self.param('length', nn.initializers.ones, (1, self.count))
        return scores


class DINOHead(nn.Module):
    """DINO's projection head (Caron et al. 2021, arXiv:2104.14294, section 3.1 and appendix C).

    Initialised as in the authors' code: the MLP from a normal distribution (there cut off at 100
    standard deviations), the last layer as PyTorch's Linear, uniform within ±1/√bottleneck.
    Authors' code: the exact GELU; here: its tanh approximation, as in the models.

    Attributes:
        prototypes: K, dimensions that the softmax is over.
        hidden: width of the MLP.
        bottleneck: dimensions in which the prototypes lie.
        layers: of the MLP.
        batch_norm: in the MLP; the authors use it with convolutional encoders' SGD recipes alone.
        learn_length: of the prototypes, see `Prototypes`.
        std: of the MLP's kernels at the start; None: LeCun's, 1/√(a layer's inputs). The authors'
            0.02 is for their widths. With 16 features and hidden=256 outputs start so small that
            GELU is linear, and targets stay uniform.
    """

    prototypes: int
    hidden: int = 2048
    bottleneck: int = 256
    layers: int = 3
    batch_norm: bool = False
    learn_length: bool = False
    std: float | None = 0.02

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, D] -> [B, K], float32."""
        start = nn.initializers
        mlp = MLP(
            self.hidden,
            self.bottleneck,
            layers=self.layers,
            batch_norm=self.batch_norm,
            activation='gelu',
            kernel_init=start.lecun_normal() if self.std is None else start.normal(self.std),
            name='mlp',
        )
        last = Prototypes(
            self.prototypes,
            self.learn_length,
            start.variance_scaling(1 / 3, 'fan_in', 'uniform'),
            name='last',
        )
        return last(mlp(x, train), train)
