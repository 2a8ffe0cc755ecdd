"""PCL (Li et al. 2021, https://arxiv.org/abs/2005.04966, Algorithm 1).

MoCo, and after every epoch an E-step: k-means of the momentum network's embeddings of the whole
training set, for several numbers of clusters. In the M-step an image is also drawn to its clusters'
prototypes, each with a temperature of its own, the concentration of its cluster (ProtoNCE, eq. 11).

Paper's code: prototypes of the batch's other images are always among the negatives, beside r drawn
ones; here: only if drawn, because r is 64 times the batch. Paper's code: the best k-means of five;
here: one, because clusters are made anew every epoch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from contrastive_jax import models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import MLP
from contrastive_jax.losses import info_nce, proto_nce, unit
from contrastive_jax.method import Aux, Batch, Method, Refresh, Tree
from contrastive_jax.networks import memory
from contrastive_jax.networks.chain import Chain, check_views, seen
from contrastive_jax.networks.kmeans import concentration, kmeans
from contrastive_jax.networks.target import Target


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.2,
    momentum: float = 0.999,
    queue: int = 16384,
    clusters: Sequence[int] = (25000, 50000, 100000),
    negatives: int = 16384,
    warmup: float = 0.1,
    iterations: int = 20,
    alpha: float = 10.0,
    projection: int = 128,
    hidden: int = 2048,
    layers: int = 2,
    batch_norm: bool = False,
) -> Method:
    """PCL v2 around an encoder; `layers=1, temperature=0.1` are v1's.

    Keys are normalised as MoCo's are here: by running averages (see `methods/moco.py`).

    Args:
        model: the encoder.
        temperature: τ of InfoNCE and the mean of the concentrations φ, > 0.
        momentum: m of the key network, from 0 to 1.
        queue: keys that are kept, at least 1.
        clusters: numbers of clusters, one clustering for each.
        negatives: r, prototypes that an embedding is compared with; 0: all.
        warmup: share of the run without prototypes (20 of 200 epochs).
        iterations: of k-means.
        alpha: α of φ, which smooths small clusters.
        projection: dimensions of queries and keys.
        hidden: width of the head's hidden layer.
        layers: of the head: 1 (v1) or 2 (v2).
        batch_norm: in the head; the authors use none.
    """
    counts = {'queue': queue, 'iterations': iterations}
    counts |= {f'clusters[{i}]': k for i, k in enumerate(clusters)}
    shares = {'warmup': warmup, 'momentum': momentum}
    check_range('config.method', {'temperature': temperature, 'alpha': alpha}, above=0, who='pcl')
    check_range('config.method', counts, least=1, whole=True, who='pcl')
    check_range('config.method', {'negatives': negatives}, least=0, whole=True, who='pcl')
    check_range('config.method', shares, least=0, most=1, who='pcl')
    network = Chain(model, projector=MLP(hidden, projection, layers, batch_norm=batch_norm))
    target = Target(network, ('encoder', 'projector'), momentum, norm='running')

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        key, queue_key = jax.random.split(key)
        params, extra = target.init(key, batch, records)
        return params, {
            **extra,
            'queue': memory.random_queue(queue_key, queue, projection),
            'clustered': jnp.zeros((), bool),
            'clusterings': [
                {
                    'prototypes': jnp.zeros((k, projection)),
                    'concentration': jnp.ones(k),
                    'assignment': jnp.zeros(records, jnp.int32),
                }
                for k in clusters
            ],
        }

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('pcl', batch['views'], 2)
        key, *draw_keys = jax.random.split(key, 1 + len(clusters))
        out, stats = network.views(params, extra['stats'], batch['views'][:, :1], key=key)
        keys, _ = target.views(extra['target'], batch['views'][:, 1:])
        query_BD, key_BD = out['projector'][:, 0], unit(keys['projector'][:, 0])
        instance = info_nce(query_BD, key_BD, extra['queue'], temperature=temperature)

        terms = []
        for draw_key, clustering in zip(draw_keys, extra['clusterings'], strict=True):
            k = len(clustering['prototypes'])
            drawn = jax.random.permutation(draw_key, k)[:negatives] if 0 < negatives < k else None
            terms.append(
                proto_nce(
                    query_BD,
                    clustering['prototypes'],
                    clustering['concentration'],
                    clustering['assignment'][batch['index']],
                    negative_indices_R=drawn,
                )
            )
        proto = jnp.where(extra['clustered'], sum(terms) / len(terms), 0.0)
        metrics = {'instance': instance, 'proto': proto}
        return instance + proto, Aux({**extra, 'stats': stats}, metrics, {'keys': key_BD})

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        extra = target.follow(params, extra, measured, progress)
        return {**extra, 'queue': memory.enqueue(extra['queue'], measured['keys'])}

    def embed(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        del params
        out, _ = target.views(extra['target'], seen(batch)[:, None])
        return {'features': unit(out['projector'][:, 0])}

    def update(extra: Tree, z_ND: jax.Array, key: jax.Array, progress: jax.Array) -> Tree:
        counts_N = (z_ND != 0).any(axis=1).astype(jnp.float32)

        def cluster(extra: Tree) -> Tree:
            clusterings = []
            for i, k in enumerate(clusters):
                found = kmeans(
                    z_ND, counts_N, k, key=jax.random.fold_in(key, i), iterations=iterations
                )
                centroids_kD, assignment_N, distance_N = found
                records = len(extra['clusterings'][i]['assignment'])
                phi = concentration(
                    distance_N, assignment_N, counts_N, k, alpha=alpha, temperature=temperature
                )
                clusterings.append(
                    {
                        'prototypes': unit(centroids_kD),
                        'concentration': phi,
                        'assignment': assignment_N[:records],
                    }
                )
            return {**extra, 'clustered': jnp.ones((), bool), 'clusterings': clusterings}

        return jax.lax.cond(progress >= warmup, cluster, lambda extra: extra, extra)

    return Method(init, loss, network.encode, after, Refresh(embed, update))
