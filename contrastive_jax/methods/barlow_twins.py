"""Barlow Twins (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230, eqs. 1 and 2).

The cross-correlation of the two views' embeddings, over the global batch, is drawn to the identity.
"""

import jax

from contrastive_jax import losses, models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import MLP
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, check_views


def make(
    model: models.Encoder,
    *,
    off_diagonal: float = 0.0051,
    scale: float = 1.0,
    projection: int = 8192,
    hidden: int = 8192,
) -> Method:
    """Barlow Twins around an encoder.

    Args:
        model: the encoder.
        off_diagonal: λ, weight of the redundancy term, at least 0.
        scale: factor of the loss, > 0: 1 in the authors' code, 0.1 in solo-learn's recipe.
        projection: dimensions of the embeddings; the paper finds that many help.
        hidden: width of the projector's two hidden layers.
    """
    check_range('config.method', {'scale': scale}, above=0, who='barlow_twins')
    check_range('config.method', {'off_diagonal': off_diagonal}, least=0, who='barlow_twins')
    network = Chain(model, apart=True, projector=MLP(hidden, projection, layers=3, last_bias=False))

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('barlow_twins', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        z_BVD = out['projector']
        value = losses.barlow_twins(z_BVD[:, 0], z_BVD[:, 1], off_diagonal=off_diagonal)
        metrics = {'output_std': losses.output_std(z_BVD[:, 0])}
        return scale * value, Aux({'stats': stats}, metrics)

    return Method(network.start, loss, network.encode)
