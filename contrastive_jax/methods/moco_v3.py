"""MoCo v3 (Chen et al. 2021, https://arxiv.org/abs/2104.02057, Algorithm 1).

No queue: the negatives of a view are the other images' keys in the global batch, in both
directions, and the query goes through a predictor that the momentum network does not have. The
paper trains ViTs with the patch projection left at random: `model.freeze_patch_embedding`.
"""

import jax

from contrastive_jax import models
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import info_nce
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks import memory
from contrastive_jax.networks.chain import Network, check_numbers, check_views


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
    check_numbers('moco_v3', ('temperature',), temperature=temperature)
    network = Network(
        model,
        projector=MLP(hidden, projection, layers, last_batch_norm=True, last_scale=False),
        predictor=MLP(hidden, projection, last_batch_norm=predictor_batch_norm, last_scale=False),
    )

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        params, extra = network.start(key, batch, records)
        target = memory.target(params, extra['stats'], ('encoder', 'projector'))
        return params, {**extra, 'target': target}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('moco_v3', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        target = extra['target']
        keys, target_stats = network.views(target['params'], target['stats'], batch['views'])
        q_BVD, k_BVD = out['predictor'], jax.lax.stop_gradient(keys['projector'])
        value = info_nce(q_BVD[:, 0], k_BVD[:, 1], temperature=temperature)
        value += info_nce(q_BVD[:, 1], k_BVD[:, 0], temperature=temperature)
        target = {'params': target['params'], 'stats': target_stats}
        # 2τ: the authors' scale, which keeps gradients alike over temperatures.
        return 2 * temperature * value, Aux({'stats': stats, 'target': target}, {})

    return Method(init, loss, network.encode, memory.rising(momentum))
