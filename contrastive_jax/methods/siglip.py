"""SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343, algorithm 1).

As CLIP, but every pair of the global batch is a yes-or-no question of its own: a sigmoid with
learned scale and bias in place of the softmax. With a frozen image encoder: SigLiT.
"""

import math

import jax
import jax.numpy as jnp

from contrastive_jax import losses, models
from contrastive_jax.config import check_range, choose
from contrastive_jax.inputs import INDEX
from contrastive_jax.losses.captions import SAME_TEXT
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.pair import Pair


def make(
    model: models.Encoder,
    *,
    text: models.Encoder,
    projection: int = 768,
    logit_scale: float = 10.0,
    logit_bias: float = -10.0,
    project_images: bool = True,
    locked: bool = False,
    same_text: str = 'negative',
) -> Method:
    """SigLIP around an image and a text encoder.

    Args:
        model: the image encoder.
        text: the text encoder.
        projection: dimensions of the shared space.
        project_images: whether a linear layer leads from image features into it. False: the space
            is that of the features, and the texts' linear layer has a bias, as in big_vision.
        logit_scale: t at the start, > 0; learned as its logarithm.
        logit_bias: b at the start, so that the many pairs that do not match start out as no's.
        locked: keep the image encoder as it is; give it weights by config.init_from.
        same_text: what an image and another one's text that equals its own are to each other:
            'negative' as in the paper, 'mask' or 'positive'; see losses.siglip.
    """
    check_range('config.method', {'logit_scale': logit_scale}, above=0, who='siglip')
    choose('same_text', same_text, dict.fromkeys(SAME_TEXT), 'config.method')
    pair = Pair(model, text, projection, locked, project_images, text_bias=not project_images)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        params, extra = pair.init(key, batch)
        scale, bias = jnp.float32(math.log(logit_scale)), jnp.float32(logit_bias)
        return {**params, 'logit_scale': scale, 'logit_bias': bias}, extra

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        image_BE, text_BE, extra = pair(params, extra, batch, key)
        scale, bias = jnp.exp(params['logit_scale']), params['logit_bias']
        texts = losses.equal_rows(batch['text'])
        same = {'same_text': same_text, 'record_B': batch[INDEX]}
        value = losses.siglip(image_BE, text_BE, scale, bias, texts, **same)
        return value, Aux(extra, {'logit_scale': scale, 'logit_bias': bias})

    return Method(init, loss, pair.encode, encoders=pair.encoders)
