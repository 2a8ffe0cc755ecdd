"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709, Algorithm 1).

Two augmented views of every image go through encoder f and projection head g; NT-Xent pulls the two
together and pushes all other views of the global batch away. Evaluators see f without g.
"""

import jax
import jax.numpy as jnp

from contrastive_jax import models
from contrastive_jax.config import check_range
from contrastive_jax.inputs import INDEX
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import nt_xent
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, check_views


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.1,
    projection: int = 128,
    hidden: int = 2048,
    layers: int = 2,
    last_batch_norm: bool = True,
) -> Method:
    """SimCLR around an encoder.

    Args:
        model: the encoder f.
        temperature: τ of NT-Xent, > 0.
        projection: dimensions of the space that views are compared in.
        hidden: width of g's hidden layers.
        layers: of g: 2 in the paper, 3 in the authors' later code and SimCLR v2.
        last_batch_norm: BatchNorm also after g's last layer, as in the authors' code.
    """
    check_range('config.method', {'temperature': temperature}, above=0, who='simclr')
    head = MLP(hidden, projection, layers=layers, last_batch_norm=last_batch_norm)
    network = Chain(model, projector=head)

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('simclr', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        z_BVD = out['projector']
        value = nt_xent(z_BVD[:, 0], z_BVD[:, 1], temperature=temperature, record_B=batch[INDEX])
        # −loss + log(candidates) bounds the mutual information of two views from below, in nats
        # (van den Oord et al. 2018, eq. 5).
        bound = jnp.log(jnp.float32(2 * len(z_BVD) - 1)) - value
        return value, Aux({'stats': stats}, {'mutual_information_bound': bound})

    return Method(network.start, loss, network.encode)
