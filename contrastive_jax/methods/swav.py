"""SwAV (Caron et al. 2020, https://arxiv.org/abs/2006.09882, Algorithm 1), with multi-crop.

Views are compared by their assignments to learned prototypes, not by their embeddings: each view
predicts the assignment of the other. Sinkhorn's iterations spread the assignments of the global
batch evenly over the prototypes, so that nothing collapses. The authors freeze 'prototypes' at the
start: `config.optim.modules`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import losses, models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import MLP, Prototypes
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks import memory
from contrastive_jax.networks.chain import Chain, join_crops

GLOBAL = 2  # views whose assignments are predicted


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    prototypes: int = 3000,
    queue: int = 0,
    queue_from: float = 0.0,
    projection: int = 128,
    hidden: int = 2048,
) -> Method:
    """SwAV around an encoder, for two views and any number of local ones.

    Paper: prototypes are scaled to length 1 after every step; here: within the forward pass.

    Args:
        model: the encoder.
        temperature: τ of the prediction, > 0.
        epsilon: ε of the assignments' entropy, > 0.
        iterations: of Sinkhorn's algorithm, at least 1.
        prototypes: K.
        queue: earlier images that take part in the assignments, once there are so many; 0: none.
            For batches that are small beside the number of prototypes. Micro-batches
            (config.accumulate) are assigned one by one, each beside the queue of before the step.
        queue_from: share of the run after which the queue begins to fill.
        projection: dimensions of the embeddings.
        hidden: width of the projector's hidden layer.
    """
    check_range(
        'config.method', {'temperature': temperature, 'epsilon': epsilon}, above=0, who='swav'
    )
    check_range('config.method', {'queue_from': queue_from}, least=0, most=1, who='swav')
    check_range('config.method', {'iterations': iterations}, least=1, whole=True, who='swav')
    check_range('config.method', {'queue': queue}, least=0, whole=True, who='swav')
    head = Prototypes(prototypes)
    network = Chain(model, projector=MLP(hidden, projection), prototypes=head)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        params, extra = network.start(key, batch, records)
        if queue:
            extra['queue'] = jnp.zeros((queue, GLOBAL, projection))
        return params, extra

    def assign(params: Tree, extra: Tree, scores_BGK: jax.Array) -> jax.Array:
        """Each view's assignments; queued images count when there are as many as can be."""
        how = {'temperature': epsilon, 'iterations': iterations}
        if not queue:
            each = [losses.sinkhorn(scores_BGK[:, g], **how) for g in range(GLOBAL)]
            return jnp.stack(each, axis=1)
        queued_KGD = extra['queue']
        flat = rearrange(queued_KGD, 'k g d -> (k g) d')
        queued, _ = models.apply(head, params['prototypes'], {}, flat, train=False)
        queued = rearrange(queued, '(k g) p -> k g p', g=GLOBAL)
        full = (queued_KGD[0] != 0).any().astype(jnp.float32)  # the oldest place, at first zeros
        counts = jnp.concatenate([jnp.ones(len(scores_BGK)), jnp.full(queue, full)])
        scores = jnp.concatenate([scores_BGK, queued])
        each = [losses.sinkhorn(scores[:, g], weights_B=counts, **how) for g in range(GLOBAL)]
        return jnp.stack(each, axis=1)[: len(scores_BGK)]

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        out, stats = join_crops('swav', network, params, extra['stats'], batch, key)
        scores_BVK, z_BGD = out['prototypes'], out['projector'][:, :GLOBAL]
        targets_BGK = assign(params, extra, scores_BVK[:, :GLOBAL])
        value = losses.swapped(targets_BGK, scores_BVK, temperature=temperature)
        metrics = {
            'output_std': losses.output_std(z_BGD[:, 0]),
            **losses.target_entropies(targets_BGK),
        }
        return value, Aux({**extra, 'stats': stats}, metrics, {'embeddings': z_BGD})

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        del params
        if not queue:
            return extra
        fuller = memory.enqueue(extra['queue'], measured['embeddings'])
        return {**extra, 'queue': jnp.where(progress >= queue_from, fuller, extra['queue'])}

    return Method(init, loss, network.encode, after)
