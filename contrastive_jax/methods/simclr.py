"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709, Algorithm 1).

Two augmented views of every image go through encoder f and projection head g; NT-Xent pulls the two
together and pushes all other views of the global batch away. Evaluators see f without g.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.heads import MLP
from contrastive_jax.losses import nt_xent
from contrastive_jax.method import Batch, Method, Metrics, Tree


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
    if not temperature > 0:
        raise UserError(f'config.method.temperature: got {temperature}; expected a number > 0.')
    head = MLP(hidden, projection, layers=layers, last_batch_norm=last_batch_norm)

    def init(key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        encoder_key, head_key = jax.random.split(key)
        images = batch['views'][:, 0].astype(jnp.float32)
        encoder, encoder_stats = models.init(model, encoder_key, images)
        (features, _), _ = models.apply(model, encoder, encoder_stats, images, train=False)
        projector, projector_stats = models.init(head, head_key, features)
        params = {'encoder': encoder, 'projector': projector}
        return params, {'encoder': encoder_stats, 'projector': projector_stats}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        del key, step
        views = batch['views']
        if views.shape[1] != 2:
            raise UserError(f'simclr: got {views.shape[1]} views an image; expected 2.')
        images = rearrange(views, 'b v h w c -> (b v) h w c')
        (features, _), encoder_stats = models.apply(
            model, params['encoder'], extra['encoder'], images, train=True
        )
        z, projector_stats = models.apply(
            head, params['projector'], extra['projector'], features, train=True
        )
        z_BVD = rearrange(z, '(b v) d -> b v d', v=2)
        value = nt_xent(z_BVD[:, 0], z_BVD[:, 1], temperature=temperature)
        # −loss + log(candidates) bounds the mutual information of two views from below, in nats
        # (van den Oord et al. 2018, eq. 5).
        bound = jnp.log(jnp.float32(images.shape[0] - 1)) - value
        extra = {'encoder': encoder_stats, 'projector': projector_stats}
        return value, (extra, {'mutual_information_bound': bound})

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        (features, named), _ = models.apply(
            model, params['encoder'], extra['encoder'], batch['image'], train=False
        )
        return {'features': features, **named}

    return Method(init, loss, encode)
