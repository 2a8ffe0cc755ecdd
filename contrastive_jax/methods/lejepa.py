"""LeJEPA (Balestriero and LeCun 2025, https://arxiv.org/abs/2511.08544, Algorithms 1 and 2).

Embeddings of all views of an image lie near the mean of those of its global views, while those of
the whole batch are spread as N(0, I), in directions that are drawn anew in each step. No teacher,
no stop-gradient, no predictor.
"""

from typing import Any

import jax

from contrastive_jax import losses, models
from contrastive_jax.config import UserError, check_range
from contrastive_jax.layers.heads import MLP
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, join_crops


def make(
    model: models.Encoder,
    *,
    weight: float = 0.05,
    directions: int = 1024,
    limit: float = 5.0,
    knots: int = 17,
    embedding: int = 512,
    hidden: int = 2048,
    projection: int = 512,
) -> Method:
    """LeJEPA around an encoder, for any number of global and local views, at least 2 together.

    Paper: with encoders that are no ViTs the mean is over all views; here: over the global ones, so
    give those encoders no local views.

    Args:
        model: the encoder.
        weight: λ, from 0 to 1, of the Gaussian term; the predictions' is 1 − λ.
        directions: M, in which embeddings are compared with a Gaussian.
        limit, knots: of the integral, see `losses.sigreg`.
        embedding: outputs of a linear layer in front of the projector; 0: there is none.
        hidden: width of the projector's two hidden layers.
        projection: dimensions of its output.
    """
    sizes = {'directions': directions, 'hidden': hidden, 'projection': projection}
    check_range('config.method', sizes, least=1, whole=True, who='lejepa')
    check_range('config.method', {'embedding': embedding}, least=0, whole=True, who='lejepa')
    check_range('config.method', {'knots': knots}, least=3, whole=True, who='lejepa')
    check_range('config.method', {'weight': weight}, least=0, most=1, who='lejepa')
    check_range('config.method', {'limit': limit}, above=0, who='lejepa')
    if knots % 2 == 0:
        raise UserError(f'config.method.knots: got {knots}; lejepa expects an odd number.')
    # No bias, which the projector's first BatchNorm would take away.
    first = {'embedding': MLP(hidden, embedding, layers=1, last_bias=False)} if embedding else {}
    heads: dict[str, Any] = {**first, 'projector': MLP(hidden, projection, layers=3)}
    network = Chain(model, **heads)

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        draw_key, key = jax.random.split(key)
        # Views of all sizes go through the heads, whose BatchNorm takes them together.
        out, stats = join_crops('lejepa', network, params, extra['stats'], batch, key, count=None)
        z_BVD = out['projector']
        if z_BVD.shape[1] < 2:
            raise UserError('config.inputs.views: got 1; lejepa needs at least 2 with local ones.')
        drawn_MD = jax.random.normal(draw_key, (directions, projection))
        how = {'weight': weight, 'limit': limit, 'knots': knots}
        value, terms = losses.lejepa(z_BVD, drawn_MD, global_views=batch['views'].shape[1], **how)
        return value, Aux({'stats': stats}, {**terms, 'output_std': losses.output_std(z_BVD[:, 0])})

    return Method(network.start, loss, network.encode)
