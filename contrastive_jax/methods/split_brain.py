"""Split-brain autoencoders (Zhang et al. 2017, https://arxiv.org/abs/1611.09842).

Two networks that share nothing: one sees the lightness of an image and predicts its colours, the
other sees the colours and predicts the lightness. What either learns, of its half of the image, is
one half of the features that evaluators see.

Dimension key: B batch, H W image, h w places, K bins.
"""

import jax
import jax.numpy as jnp
import optax

from contrastive_jax import models
from contrastive_jax.augment import lab
from contrastive_jax.config import check_range
from contrastive_jax.losses import color
from contrastive_jax.method import Aux, Batch, Method, Task, Tree
from contrastive_jax.networks.chain import check_views, seen
from contrastive_jax.networks.maps import Maps, check_sees, middles

PREDICTS = {'L': 'ab', 'ab': 'L'}  # what a part sees -> what its head says


def make(
    model: models.Encoder,
    *,
    stride: int = 0,
    width: int = 256,
    levels: int = 100,
    neighbours: int = 5,
    sigma: float = 5.0,
) -> Method:
    """Each part of an encoder of images in Lab (`inputs/lab`) predicts what the other one sees.

    Both predict classes, by cross-entropy: ab softly over the bins of colorization, without
    weights, L as one of equal levels. The losses are added; as the parts share nothing, each
    learns as if alone. With `config.model.sees` = ('L',) or ('ab',) there is one part: the paper's
    controls.

    Of the task evaluators have the share of places whose most likely bin is the right one:
    'accuracy_ab', 'accuracy_L', and 'accuracy', their mean.

    Args:
        model: 'lab', whose parts see 'L', 'ab' or one each, of encoders that give 'map' or
            'patches'.
        stride: of the places, pixels; where the map's is smaller, they are the map's. 0: the map's.
        width: of the heads' hidden layers.
        levels: bins of L, from 2.
        neighbours: k, bins that a colour is shared by, from 1.
        sigma: σ of the soft encoding, in ab; > 0.
    """
    who, where = 'split_brain', 'config.method'
    check_range(where, {'sigma': sigma}, above=0, who=who)
    check_range(where, {'levels': levels}, least=2, whole=True, who=who)
    check_range(where, {'stride': stride}, least=0, whole=True, who=who)
    check_range(where, {'width': width, 'neighbours': neighbours}, least=1, whole=True, who=who)
    sees = check_sees(who, model, [('L', 'ab'), ('ab', 'L'), ('L',), ('ab',)])
    said = [PREDICTS[name] for name in sees]
    centres_Q2 = color.bins()
    counts = {'ab': len(centres_Q2), 'L': levels}
    network = Maps(who, model, stride, width, {f'head_{name}': counts[name] for name in said})

    def targets(name: str, lab_BHW3: jax.Array, logits_BhwK: jax.Array) -> jax.Array:
        """Distributions over the bins of what a head says, [B, h, w, K]."""
        x = middles(lab_BHW3, logits_BhwK)
        if name == 'ab':
            options = {'neighbours': neighbours, 'sigma': sigma}
            return color.soft_encoding(x[..., 1:], centres_Q2, **options)
        level = jnp.clip(jnp.floor(x[..., 0] * (levels / 100)), 0, levels - 1)
        return jax.nn.one_hot(level.astype(jnp.int32), levels)

    def right(logits: jax.Array, target: jax.Array) -> jax.Array:
        """Share of the places of each image, [B]."""
        return (logits.argmax(-1) == target.argmax(-1)).mean((1, 2))

    def accuracies(each: dict[str, jax.Array]) -> dict[str, jax.Array]:
        mean = jnp.mean(jnp.stack(list(each.values())), axis=0)
        return {'accuracy': mean, **{f'accuracy_{name}': x for name, x in each.items()}}

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        params, stats = network.init(key, batch['views'][:, 0])
        return params, {'stats': stats}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views(who, batch['lab'], 1)
        found, stats = network(params, extra['stats'], batch['views'][:, 0], key=key)
        value, metrics, each = jnp.float32(0), {}, {}
        for name in said:
            logits = found[f'head_{name}']
            target = targets(name, batch['lab'][:, 0], logits)
            metrics[f'loss_{name}'] = optax.softmax_cross_entropy(logits, target).mean()
            each[name] = right(logits, target).mean()
            value += metrics[f'loss_{name}']
        return value, Aux({'stats': stats}, {**metrics, **accuracies(each)})

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        return network.chain.encode(params, extra, batch)

    def score(params: Tree, extra: Tree, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        del key
        images = seen(batch)
        found, _ = network(params, extra['stats'], images, train=False)
        logits = {name: found[f'head_{name}'] for name in said}
        true = lab.unscaled(images)
        return accuracies({name: right(x, targets(name, true, x)) for name, x in logits.items()})

    names = accuracies({name: jnp.zeros(()) for name in said})
    return Method(init, loss, encode, task=Task(score, dict.fromkeys(names, '%')))
