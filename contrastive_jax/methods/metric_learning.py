"""The classics of metric learning, on labelled images: max-margin (Hadsell et al. 2006,
http://yann.lecun.com/exdb/publis/pdf/hadsell-chopra-lecun-06.pdf), triplet (FaceNet, Schroff et al.
2015, https://arxiv.org/abs/1503.03832) and N-pair (Sohn 2016).

Every view of an image with the same label is near, every other one far.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import losses, models
from contrastive_jax.config import UserError, call, choose
from contrastive_jax.layers.heads import MLP
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, check_views

LOSSES = {'max_margin': losses.max_margin, 'triplet': losses.triplet, 'n_pair': losses.n_pair}


def make(
    model: models.Encoder,
    *,
    loss: str = 'triplet',
    options: Mapping[str, Any] | None = None,
    projection: int = 128,
    unit: bool = True,
) -> Method:
    """Metric learning with a linear embedding on top of an encoder.

    Args:
        model: the encoder.
        loss: 'max_margin', 'triplet' (any number of views) or 'n_pair' (two views).
        options: keywords of that function of `losses`: margin, mining, distance, l2. With
            distance='mahalanobis' its map is learned, from the identity.
        projection: dimensions of the embedding.
        unit: scale embeddings to length 1, as FaceNet does; not for N-pair, which is about
            lengths too.
    """
    options = dict(options or {})
    function = choose('loss', loss, LOSSES, 'config.method')
    if loss == 'n_pair' and unit:
        raise UserError("config.method.unit: got True; loss='n_pair' is on inner products: False.")
    mapped = options.get('distance') == 'mahalanobis'
    network = Chain(model, projector=MLP(projection, projection, layers=1))

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        params, extra = network.start(key, batch, records)
        if mapped:
            params['map'] = jnp.eye(projection)
        return params, extra

    def compute(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        z_BVD = out['projector']
        B, V = z_BVD.shape[:2]
        # An image without a label is a class of its own.
        label_B = jnp.where(batch['label'] < 0, -1 - jnp.arange(B), batch['label'])
        more = {'map_KD': params['map']} if mapped else {}
        if loss == 'n_pair':
            check_views('metric_learning', batch['views'], 2)
            embeddings = (z_BVD[:, 0], z_BVD[:, 1])
        else:
            z_RD = rearrange(z_BVD, 'b v d -> (b v) d')
            embeddings = (losses.unit(z_RD) if unit else z_RD,)
            label_B = jnp.repeat(label_B, V, total_repeat_length=B * V)
        value = call(function, 'config.method.options', *embeddings, label_B, **options, **more)
        return value, Aux({'stats': stats}, {})

    return Method(init, compute, network.encode)
