"""SupCon (Khosla et al. 2020, https://arxiv.org/abs/2004.11362, eqs. 2 and 3).

SimCLR with labels: every view of an image with the same label is a positive.

Paper's code (SupContrast): the loss is τ / 0.07 times ours; BatchNorm over a GPU's images; here:
over the global batch, all views together, because results do not depend on devices.
"""

import jax
import jax.numpy as jnp

from contrastive_jax import losses, models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import MLP
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.1,
    log: str = 'out',
    projection: int = 128,
    hidden: int = 2048,
    batch_norm: bool = False,
) -> Method:
    """SupCon around an encoder, for any number of views.

    Args:
        model: the encoder.
        temperature: τ, > 0.
        log: 'out' (L_out, the better one in the paper) or 'in' (L_in).
        projection: dimensions of the space that views are compared in.
        hidden: width of the projector's hidden layer.
        batch_norm: in the projector; the authors use none.
    """
    check_range('config.method', {'temperature': temperature}, above=0, who='sup_con')
    network = Chain(model, projector=MLP(hidden, projection, batch_norm=batch_norm))

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        # An image without a label is a class of its own.
        label_B = batch['label']
        label_B = jnp.where(label_B < 0, -1 - jnp.arange(len(label_B)), label_B)
        value = losses.sup_con(out['projector'], label_B, temperature, log=log)
        return value, Aux({'stats': stats}, {})

    return Method(network.start, loss, network.encode)
