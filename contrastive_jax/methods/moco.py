"""MoCo v1 (He et al. 2020, https://arxiv.org/abs/1911.05722, Algorithm 1) and v2 (Chen et al. 2020,
https://arxiv.org/abs/2003.04297).

A query is compared with its key, which a slowly moving copy of the network makes of another view,
and with a queue of earlier keys. v2 adds a hidden layer to the head; the rest of v2 (blur, cosine
schedule, temperature) is in the config.

BatchNorm would give the answer away: a batch's keys carry that batch's statistics and the queue's
carry others'. Paper: BatchNorm over a GPU's images (eighths of the batch in the CIFAR-10 notebook),
the keys' after a shuffle among them; here: queries by the global batch, because results do not
depend on devices, and keys by running averages, which follow the query network's as its weights do
(EMAN, Cai et al. 2021, https://arxiv.org/abs/2101.08482): a key depends on its own image alone.
"""

import jax

from contrastive_jax import models
from contrastive_jax.config import check_range, choose
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import info_nce, unit
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks import memory
from contrastive_jax.networks.chain import Chain, check_views
from contrastive_jax.networks.target import Target


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.2,
    momentum: float = 0.999,
    queue: int = 65536,
    projection: int = 128,
    hidden: int = 2048,
    layers: int = 2,
    batch_norm: bool = False,
    symmetric: bool = False,
    key_norm: str = 'running',
) -> Method:
    """MoCo around an encoder; the defaults are v2's, `layers=1, temperature=0.07` are v1's.

    Args:
        model: the encoder.
        temperature: τ of InfoNCE, > 0.
        momentum: m of the key network, from 0 to 1.
        queue: K, keys that are kept, at least 1.
        projection: dimensions of queries and keys.
        hidden: width of the head's hidden layer.
        layers: of the head: 1 (v1) or 2 (v2).
        batch_norm: in the head; the authors use none.
        symmetric: each view is query and key in turn and the two losses are added, as in the
            authors' CIFAR-10 notebook.
        key_norm: statistics of the key network's BatchNorm: 'running' (see above) or 'batch',
            those of the batch, for comparison.
    """
    check_range('config.method', {'temperature': temperature}, above=0, who='moco')
    check_range('config.method', {'momentum': momentum}, least=0, most=1, who='moco')
    check_range('config.method', {'queue': queue}, least=1, whole=True, who='moco')
    choose('key_norm', key_norm, dict.fromkeys(('running', 'batch')), 'config.method')
    head = MLP(hidden, projection, layers=layers, batch_norm=batch_norm)
    network = Chain(model, apart=True, projector=head)
    target = Target(network, ('encoder', 'projector'), momentum, norm=key_norm)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        key, queue_key = jax.random.split(key)
        params, extra = target.init(key, batch, records)
        return params, {**extra, 'queue': memory.random_queue(queue_key, queue, projection)}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        views = batch['views']
        check_views('moco', views, 2)
        to_query, to_key = (views, views[:, ::-1]) if symmetric else (views[:, :1], views[:, 1:])
        out, stats = network.views(params, extra['stats'], to_query, key=key)
        keys, target_state = target.views(extra['target'], to_key)
        query_RD = out['projector'].reshape(-1, projection)
        key_RD = unit(keys['projector'].reshape(-1, projection))
        value = info_nce(query_RD, key_RD, extra['queue'], temperature=temperature)
        value *= to_query.shape[1]  # a sum over the directions, each a mean
        extra = {**extra, 'stats': stats, 'target': target_state}
        return value, Aux(extra, {}, {'keys': key_RD.reshape(*to_key.shape[:2], projection)})

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        extra = target.follow(params, extra, measured, progress)
        key_RD = measured['keys'].reshape(-1, projection)
        return {**extra, 'queue': memory.enqueue(extra['queue'], key_RD)}

    return Method(init, loss, network.encode, after)
