"""BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733, section 3.1).

A predictor on top of the network foretells what a slowly moving copy of it says of the other view;
there are no negatives.

Paper's code: the target's first weights are another draw; here: a copy, as MoCo's, because the
authors saw no difference.
"""

import jax

from contrastive_jax import models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import cosine_distance, output_std
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, check_views
from contrastive_jax.networks.target import Target, momentum_to_one


def make(
    model: models.Encoder,
    *,
    momentum: float = 0.996,
    projection: int = 256,
    hidden: int = 4096,
) -> Method:
    """BYOL around an encoder.

    Args:
        model: the encoder.
        momentum: of the target at the start, from 0 to 1; it rises to 1 by a cosine.
        projection: dimensions that are predicted.
        hidden: width of the hidden layers of projector and predictor.
    """
    check_range('config.method', {'momentum': momentum}, least=0, most=1, who='byol')
    # The predictor's BatchNorm keeps gradients from a bias in front of it, so Adam would let it
    # wander, and the targets with it.
    projector = MLP(hidden, projection, last_bias=False)
    network = Chain(
        model, apart=True, projector=projector, predictor=MLP(hidden, projection, last_bias=False)
    )
    target = Target(network, ('encoder', 'projector'), momentum_to_one(momentum))

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('byol', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        aims, target_state = target.views(extra['target'], batch['views'])
        p_BVD, z_BVD = out['predictor'], aims['projector']
        value = cosine_distance(p_BVD[:, 0], z_BVD[:, 1])
        value += cosine_distance(p_BVD[:, 1], z_BVD[:, 0])
        metrics = {'output_std': output_std(out['projector'][:, 0])}
        return value, Aux({'stats': stats, 'target': target_state}, metrics)

    return Method(target.init, loss, network.encode, target.follow)
