"""NNCLR (Dwibedi et al. 2021, https://arxiv.org/abs/2104.14548, eqs. 1 to 3).

The positive of a view is not the other view's embedding but that embedding's nearest neighbour in a
queue of earlier ones: another image that looks alike.

The authors' code is not public. BatchNorm takes each view by itself, as Algorithm 1 has a call for
each; heads are as in section 4.1.
"""

import jax
import jax.numpy as jnp

from contrastive_jax import models, similarity
from contrastive_jax.config import check_range
from contrastive_jax.inputs import INDEX
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import info_nce, unit
from contrastive_jax.losses.scores import inner
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks import memory
from contrastive_jax.networks.chain import Chain, check_views


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.1,
    queue: int = 98304,
    projection: int = 256,
    hidden: int = 2048,
    predictor: int = 4096,
) -> Method:
    """NNCLR around an encoder.

    Args:
        model: the encoder.
        temperature: τ, > 0.
        queue: Q, embeddings in the support set, at least 1.
        projection: dimensions of the embeddings.
        hidden: width of the projector's two hidden layers.
        predictor: width of the predictor's hidden layer.
    """
    check_range('config.method', {'temperature': temperature}, above=0, who='nnclr')
    check_range('config.method', {'queue': queue}, least=1, whole=True, who='nnclr')
    network = Chain(
        model,
        apart=True,
        projector=MLP(hidden, projection, layers=3, last_batch_norm=True),
        predictor=MLP(predictor, projection),
    )

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        key, queue_key = jax.random.split(key)
        params, extra = network.start(key, batch, records)
        return params, {**extra, 'queue': memory.random_queue(queue_key, queue, projection)}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('nnclr', batch['views'], 2)
        out, stats = network.views(params, extra['stats'], batch['views'], key=key)
        p_BVD = out['predictor']
        z_BVD = jax.lax.stop_gradient(unit(out['projector'].reshape(-1, projection)))
        z_BVD = z_BVD.reshape(p_BVD.shape)
        nearest_BVD, closeness = neighbours(z_BVD, extra['queue'])
        how = {'temperature': temperature, 'record_B': batch[INDEX]}
        value = info_nce(nearest_BVD[:, 0], p_BVD[:, 1], **how)
        value += info_nce(nearest_BVD[:, 1], p_BVD[:, 0], **how)
        extra = {**extra, 'stats': stats}
        return value / 2, Aux(extra, {'neighbour_cosine': closeness}, {'embeddings': z_BVD[:, 0]})

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        del params, progress
        return {**extra, 'queue': memory.enqueue(extra['queue'], measured['embeddings'])}

    return Method(init, loss, network.encode, after)


def neighbours(z_BVD: jax.Array, queue_KD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each unit embedding's nearest one in the queue, and the mean cosine to it."""
    cosine_R1, index_R1 = similarity.top_k(
        lambda row, bank: inner(row, bank, jnp.float32),
        z_BVD.reshape(-1, z_BVD.shape[-1]),
        queue_KD,
        1,
    )
    return queue_KD[index_R1[:, 0]].reshape(z_BVD.shape), jnp.mean(cosine_R1)
