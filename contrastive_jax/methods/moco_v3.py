"""MoCo v3 (Chen et al. 2021, https://arxiv.org/abs/2104.02057, Algorithm 1).

No queue: the negatives of a view are the other images' keys in the global batch, in both
directions, and the query goes through a predictor that the momentum network does not have. The
paper trains ViTs with the patch projection left at random: `model.freeze_patch_embedding`.
"""

import jax

from contrastive_jax import models
from contrastive_jax.config import check_range
from contrastive_jax.inputs import INDEX
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import info_nce
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, check_views
from contrastive_jax.networks.target import Target, momentum_to_one


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.2,
    momentum: float = 0.99,
    projection: int = 256,
    hidden: int = 4096,
    layers: int = 3,
    predictor_batch_norm: bool = True,
) -> Method:
    """MoCo v3 around an encoder.

    Args:
        model: the encoder.
        temperature: τ, > 0: 0.2 for ViTs, 1.0 for ResNet-50.
        momentum: m of the target at the start, from 0 to 1; it rises to 1 by a cosine.
        projection: dimensions of queries and keys.
        hidden: width of the heads' hidden layers.
        layers: of the projector: 3 for ViTs, 2 for ResNet-50.
        predictor_batch_norm: BatchNorm after the predictor's last layer: for ViTs, not ResNet-50.
    """
    check_range('config.method', {'temperature': temperature}, above=0, who='moco_v3')
    check_range('config.method', {'momentum': momentum}, least=0, most=1, who='moco_v3')
    network = Chain(
        model,
        apart=True,
        projector=MLP(hidden, projection, layers, last_batch_norm=True, last_scale=False),
        predictor=MLP(
            hidden,
            projection,
            last_batch_norm=predictor_batch_norm,
            last_scale=False,
            last_bias=False,
        ),
    )
    target = Target(network, ('encoder', 'projector'), momentum_to_one(momentum))

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('moco_v3', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        keys, target_state = target.views(extra['target'], batch['views'])
        q_BVD, k_BVD = out['predictor'], keys['projector']
        how = {'temperature': temperature, 'record_B': batch[INDEX]}
        value = info_nce(q_BVD[:, 0], k_BVD[:, 1], **how)
        value += info_nce(q_BVD[:, 1], k_BVD[:, 0], **how)
        # 2τ: the authors' scale, which keeps gradients alike over temperatures.
        return 2 * temperature * value, Aux({'stats': stats, 'target': target_state}, {})

    return Method(target.init, loss, network.encode, target.follow)
