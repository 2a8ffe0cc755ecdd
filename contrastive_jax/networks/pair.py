"""Two networks, one for images and one for texts, into one space: what CLIP and SigLIP share.

Dimension key: B batch, V views, H W image, T tokens, E the shared space.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.layers.heads import MLP
from contrastive_jax.method import Batch, Encoders, Tree
from contrastive_jax.networks.chain import Chain, check_views

SIMILARITY = ('logit_scale', 'logit_bias')  # parameters of methods, where they learn them


class Pair:
    """An image and a text encoder, each with a linear projection into the shared space.

    Parameters are {'encoder', 'projection', 'text': {'encoder', 'projection'}}, `extra` is
    {'stats', 'text_stats'}.

    Args:
        image, text: the encoders.
        projection: dimensions of the shared space.
        locked: the image encoder is not among the parameters but in `extra`, where no gradient and
            no weight decay reach it, and is not projected (LiT, Zhai et al. 2022, arXiv:2111.07991,
            section 3.3, "Lu").
        project_images: False: the shared space is that of the image features.
        text_bias: of the texts' projection; the images' has none.
    """

    def __init__(
        self,
        image: models.Encoder,
        text: models.Encoder,
        projection: int,
        locked: bool,
        project_images: bool = True,
        text_bias: bool = False,
    ):
        self.projection, self.locked = projection, locked
        self.projected = project_images and not locked
        linear = MLP(1, projection, layers=1, last_bias=False)
        self.image = Chain(image, projection=linear) if self.projected else Chain(image)
        self.text = Chain(text, projection=MLP(1, projection, layers=1, last_bias=text_bias))

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """`(params, extra)` from 'views' and 'text'.

        Raises:
            UserError: image features that are not of the space's size and are not projected.
        """
        keys = jax.random.split(key)
        params, stats = self.image.init(keys[0], batch['views'][:, 0])
        text, text_stats = self.text.init(keys[1], batch['text'])
        extra = {'stats': stats, 'text_stats': text_stats}
        if not self.projected:
            features = self.image.features(params, stats, batch['views'][:, 0])['features']
            if features.shape[1] != self.projection:
                raise UserError(
                    f'config.method.projection: got {self.projection}; without a projection of '
                    f'images the shared space is that of their features, {features.shape[1]}.'
                )
        if self.locked:
            extra['frozen'] = params
            params = {}
        return {**params, 'text': text}, extra

    def __call__(
        self, params: Tree, extra: Tree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Embeddings [B, E] of images and texts, row-aligned, and the new `extra`.

        Raises:
            UserError: more or fewer than one view an image.
        """
        check_views('a pair', batch['views'], 1)
        keys = jax.random.split(key)
        images = rearrange(batch['views'], 'b 1 h w c -> b h w c')
        if self.locked:
            image_BE = self.image.features(extra['frozen'], extra['stats'], images)['features']
            image_BE, stats = jax.lax.stop_gradient(image_BE), extra['stats']
        else:
            out, stats = self.image(params, extra['stats'], images, key=keys[0])
            image_BE = out['projection' if self.projected else 'encoder']
        out, text_stats = self.text(params['text'], extra['text_stats'], batch['text'], key=keys[1])
        return image_BE, out['projection'], {**extra, 'stats': stats, 'text_stats': text_stats}

    def encode(self, params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        """`Method.encode`, of images or of texts."""
        if 'text' in batch:
            out, _ = self.text(params['text'], extra['text_stats'], batch['text'], train=False)
            return {'embedding': out['projection']}
        params = extra.get('frozen', params)
        out, _ = self.image(params, extra['stats'], batch['image'], train=False)
        features = out['encoder']
        return {
            'features': features,
            'embedding': out.get('projection', features),
            **out['named'],
        }

    def encoders(self, params: Tree, extra: Tree) -> Encoders:
        """`Method.encoders`."""
        image, text = extra.get('frozen', params), params['text']
        found = {
            'image': (image['encoder'], extra['stats']['encoder']),
            'text': (text['encoder'], extra['text_stats']['encoder']),
            'text_projection': (text['projection'], extra['text_stats']['projection']),
        }
        if self.projected:
            found['image_projection'] = image['projection'], extra['stats']['projection']
        learned = {name: params[name] for name in SIMILARITY if name in params}
        return {**found, 'similarity': (learned, {})}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x: jax.Array, limit: float) -> jax.Array:
    """The smaller of a learned scalar and a limit, which the scalar can always leave downwards.

    CLIP sets its scale back to the limit after a step that passed it. Here the scalar stays where
    the step left it and counts as the limit; the gradient that would push it further is left out.
    """
    return jnp.minimum(x, limit)


def _forward(x: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    return at_most(x, limit), x


def _backward(limit: float, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((x > limit) & (gradient < 0), 0.0, gradient),)


at_most.defvjp(_forward, _backward)
