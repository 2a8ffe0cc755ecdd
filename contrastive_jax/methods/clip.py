"""CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3).

Images and their captions, each through its own encoder and a linear projection; a softmax over all
pairs of the global batch, in both directions, with a learned temperature. With a frozen image
encoder: LiT (Zhai et al. 2022, https://arxiv.org/abs/2111.07991).

Paper's code: kernels start from normal distributions that narrow with width and depth; here: as
the models' own do (Xavier's), because a method knows no layer of its encoders.
"""

import math

import jax
import jax.numpy as jnp

from contrastive_jax import losses, models
from contrastive_jax.config import check_range, choose
from contrastive_jax.inputs import INDEX
from contrastive_jax.losses.captions import SAME_TEXT
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.pair import Pair, at_most


def make(
    model: models.Encoder,
    *,
    text: models.Encoder,
    projection: int = 512,
    temperature: float = 0.07,
    most: float = 100.0,
    locked: bool = False,
    same_text: str = 'negative',
) -> Method:
    """CLIP around an image and a text encoder.

    Args:
        model: the image encoder.
        text: the text encoder.
        projection: dimensions of the shared space.
        temperature: τ at the start, > 0; learned as log 1/τ (section 2.5).
        most: of 1/τ, > 0; the paper clips it at 100 for stability.
        locked: keep the image encoder as it is, LiT; give it weights by config.init_from.
        same_text: what an image and another one's text that equals its own are to each other:
            'negative' as in the paper, 'mask' or 'positive'; see losses.clip.
    """
    check_range('config.method', {'temperature': temperature, 'most': most}, above=0, who='clip')
    choose('same_text', same_text, dict.fromkeys(SAME_TEXT), 'config.method')
    pair = Pair(model, text, projection, locked)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        params, extra = pair.init(key, batch)
        return {**params, 'logit_scale': jnp.float32(-math.log(temperature))}, extra

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        image_BE, text_BE, extra = pair(params, extra, batch, key)
        scale = jnp.exp(at_most(params['logit_scale'], math.log(most)))
        texts = losses.equal_rows(batch['text'])
        same = {'same_text': same_text, 'record_B': batch[INDEX]}
        value = losses.clip(image_BE, text_BE, scale, texts, **same)
        # log B − loss bounds the mutual information from below, in nats (van den Oord et al. 2018).
        bound = jnp.log(jnp.float32(len(image_BE))) - value
        return value, Aux(extra, {'mutual_information_bound': bound, 'logit_scale': scale})

    return Method(init, loss, pair.encode, encoders=pair.encoders)
