"""SimSiam (Chen and He 2021, https://arxiv.org/abs/2011.10566, Algorithm 1).

BYOL without the momentum copy: the network predicts its own output of the other view, and the
gradient stops at what is predicted. Without that stop it collapses (figure 2).
"""

import jax

from contrastive_jax import models
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import cosine_distance, output_std
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, check_views


def make(
    model: models.Encoder,
    *,
    projection: int = 2048,
    hidden: int = 2048,
    layers: int = 3,
    predictor: int = 512,
    last_batch_norm: bool = True,
    stop_gradient: bool = True,
) -> Method:
    """SimSiam around an encoder.

    Args:
        model: the encoder.
        projection: dimensions that are predicted.
        hidden: width of the projector's hidden layers.
        layers: of the projector: 3 for ImageNet, 2 for CIFAR-10.
        predictor: width of the predictor's hidden layer, a quarter of `projection` in the paper.
        last_batch_norm: BatchNorm after the projector's last layer; without it training is a little
            worse (table 3) and a collapse shows in `output_std`.
        stop_gradient: False shows the collapse of figure 2.
    """
    # Without a BatchNorm of its own it has the predictor's behind it, which a bias does not pass.
    head = MLP(
        hidden,
        projection,
        layers,
        last_batch_norm=last_batch_norm,
        last_scale=False,
        last_bias=False,
    )
    network = Chain(model, apart=True, projector=head, predictor=MLP(predictor, projection))

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('simsiam', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        p_BVD, z_BVD = out['predictor'], out['projector']
        metrics = {'output_std': output_std(z_BVD[:, 0])}
        if stop_gradient:
            z_BVD = jax.lax.stop_gradient(z_BVD)
        distance = cosine_distance(p_BVD[:, 0], z_BVD[:, 1])
        distance += cosine_distance(p_BVD[:, 1], z_BVD[:, 0])
        # The paper's −cos, the mean of both directions: from −1, the best, to 1.
        return distance / 4 - 1, Aux({'stats': stats}, metrics)

    return Method(network.start, loss, network.encode)
