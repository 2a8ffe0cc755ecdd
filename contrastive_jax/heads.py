"""Heads on top of an encoder's features: they are trained with it and dropped after.

Dimension key: B batch, D features, E output.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax.config import UserError


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

    Raises:
        UserError: (when called) a number below 1.
    """

    hidden: int
    out: int
    layers: int = 2
    batch_norm: bool = True
    last_batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, D] -> [B, E], float32, not normalised."""
        for key in ('hidden', 'out', 'layers'):
            if getattr(self, key) < 1:
                raise UserError(f'head: got {key}={getattr(self, key)}; expected at least 1.')
        x = x.astype(jnp.float32)
        for i in range(1, self.layers + 1):
            last = i == self.layers
            norm = self.last_batch_norm if last else self.batch_norm
            x = nn.Dense(self.out if last else self.hidden, use_bias=not norm, name=f'linear{i}')(x)
            if norm:
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    epsilon=1e-5,
                    use_bias=not last,
                    use_fast_variance=False,  # E[x²] − E[x]² cancels
                    name=f'norm{i}',
                )(x)
            if not last:
                x = nn.relu(x)
        return x
