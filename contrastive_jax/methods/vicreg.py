"""VICReg (Bardes et al. 2022, https://arxiv.org/abs/2105.04906, eqs. 1 to 6).

Views agree (invariance) while every dimension keeps its variance and no two are correlated
(covariance), both over the global batch.
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
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    projection: int = 8192,
    hidden: int = 8192,
) -> Method:
    """VICReg around an encoder.

    Args:
        model: the encoder.
        invariance, variance, covariance: weights of the three terms, at least 0.
        projection: dimensions of the embeddings.
        hidden: width of the expander's two hidden layers.
    """
    weights = {'invariance': invariance, 'variance': variance, 'covariance': covariance}
    check_range('config.method', weights, least=0, who='vicreg')
    network = Chain(model, apart=True, projector=MLP(hidden, projection, layers=3, last_bias=False))

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('vicreg', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        z_BVD = out['projector']
        value, terms = losses.vicreg(z_BVD[:, 0], z_BVD[:, 1], **weights)
        metrics = {**terms, 'output_std': losses.output_std(z_BVD[:, 0])}
        return value, Aux({'stats': stats}, metrics)

    return Method(network.start, loss, network.encode)
