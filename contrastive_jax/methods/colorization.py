"""Colorization (Zhang et al. 2016, https://arxiv.org/abs/1603.08511).

An encoder sees the lightness of an image, and a head on its map says of every place which colour it
has, as a distribution over bins of ab: what a thing is says what colours it may have. Rare colours
count for more, or all would become grey. Evaluators see the encoder.

Dimension key: B batch, H W image, h w places, Q bins.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastive_jax import models
from contrastive_jax.augment import lab
from contrastive_jax.config import check_range
from contrastive_jax.losses import color
from contrastive_jax.method import Aux, Batch, Method, Task, Tree
from contrastive_jax.networks.chain import check_views, seen
from contrastive_jax.networks.maps import Maps, check_sees, middles

GREY = 5.0  # images without a larger |a| or |b| teach nothing of colour


def make(
    model: models.Encoder,
    *,
    stride: int = 4,
    width: int = 256,
    neighbours: int = 5,
    sigma: float = 5.0,
    uniform: float = 0.5,
    prior_momentum: float = 0.99,
    temperature: float = 0.38,
) -> Method:
    """Colours of the places of an image in Lab (`inputs/lab`), by a head on the encoder's map.

    How frequent colours are, the prior, is counted in the images themselves: a histogram that
    follows every step's, of the global batch. Images that are grey count nowhere. Paper: the prior
    is ImageNet's; here: the data's own. Authors' code: 10 neighbours, λ shared by the bins that
    occur, places are every 4th pixel from the first; here: the paper's 5, λ shared by all bins,
    the same pixels but from the middle of each place, which is where the upsampled colour is.

    Beside the encoder's outputs evaluators can have 'ab' [B, H, W, 2], the colours as an annealed
    mean, enlarged to the image; of the task, the share of places whose most likely bin is the
    right one.

    Args:
        model: 'lab' of lightness alone, of an encoder that gives 'map' or 'patches'.
        stride: of the places, pixels; where the map's is smaller, they are the map's. 0: the map's.
        width: of the head's hidden layers.
        neighbours: k, bins that a colour is shared by, from 1.
        sigma: σ of the soft encoding, and of the smoothing of the prior, in ab; > 0.
        uniform: λ, the uniform share of the prior that weights are made of, in (0, 1]; 1: all
            colours count alike.
        prior_momentum: of the histogram, from 0 to 1.
        temperature: T of the annealed mean, > 0.
    """
    who, where = 'colorization', 'config.method'
    positive = {'sigma': sigma, 'temperature': temperature}
    check_range(where, positive, above=0, who=who)
    check_range(where, {'uniform': uniform}, above=0, most=1, who=who)
    check_range(where, {'prior_momentum': prior_momentum}, least=0, most=1, who=who)
    check_range(where, {'stride': stride}, least=0, whole=True, who=who)
    check_range(where, {'width': width, 'neighbours': neighbours}, least=1, whole=True, who=who)
    check_sees(who, model, [('L',)])
    centres_Q2 = color.bins()
    Q = len(centres_Q2)
    network = Maps(who, model, stride, width, {'colours': Q})

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        params, stats = network.init(key, batch['views'][:, 0])
        return params, {'stats': stats, 'prior': jnp.full(Q, 1 / Q, jnp.float32)}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views(who, batch['lab'], 1)
        found, stats = network(params, extra['stats'], batch['views'][:, 0], key=key)
        logits_BhwQ = found['colours']
        ab_Bhw2 = middles(batch['lab'][:, 0], logits_BhwQ)[..., 1:]
        colourful_B = jnp.any(jnp.abs(ab_Bhw2) > GREY, axis=(1, 2, 3)).astype(jnp.float32)
        options = {'neighbours': neighbours, 'sigma': sigma}
        target_BhwQ = color.soft_encoding(ab_Bhw2, centres_Q2, **options)
        bin_Bhw = target_BhwQ.argmax(-1)
        weight_Q = color.class_weights(extra['prior'], centres_Q2, uniform=uniform, sigma=sigma)
        counts_Bhw = jnp.broadcast_to(colourful_B[:, None, None], bin_Bhw.shape)
        error_Bhw = weight_Q[bin_Bhw] * optax.softmax_cross_entropy(logits_BhwQ, target_BhwQ)
        count = jnp.maximum(counts_Bhw.sum(), 1.0)
        right_Bhw = logits_BhwQ.argmax(-1) == bin_Bhw
        metrics = {
            'accuracy': jnp.sum(counts_Bhw * right_Bhw) / count,
            'grey': 1 - colourful_B.mean(),
        }
        hits_BhwQ = jax.nn.one_hot(bin_Bhw, Q) * counts_Bhw[..., None]
        measured = {'histogram': hits_BhwQ.mean((0, 1, 2))[None]}
        value = jnp.sum(counts_Bhw * error_Bhw) / count
        return value, Aux({**extra, 'stats': stats}, metrics, measured)

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        del params, progress
        histogram_Q = measured['histogram'].mean(0)
        total = histogram_Q.sum()
        share_Q = histogram_Q / jnp.where(total > 0, total, 1.0)
        moved_Q = prior_momentum * extra['prior'] + (1 - prior_momentum) * share_Q
        return {**extra, 'prior': jnp.where(total > 0, moved_Q, extra['prior'])}

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        images = seen(batch)
        found, _ = network(params, extra['stats'], images, train=False)
        ab = color.annealed_mean(found['colours'], centres_Q2, temperature)
        ab = jax.image.resize(ab, (*images.shape[:3], 2), 'bilinear')
        return {**network.chain.features(params, extra['stats'], images), 'ab': ab}

    def score(params: Tree, extra: Tree, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        del key
        images = seen(batch)
        found, _ = network(params, extra['stats'], images, train=False)
        ab = middles(lab.unscaled(images)[..., 1:], found['colours'])
        right = found['colours'].argmax(-1) == nearest(ab, centres_Q2)
        return {'accuracy': right.mean((1, 2))}

    return Method(init, loss, encode, after, task=Task(score, {'accuracy': '%'}))


def nearest(ab: jax.Array, centres_Q2: np.ndarray) -> jax.Array:
    """The bin of each colour, [...] int32."""
    return color.soft_encoding(ab, centres_Q2, neighbours=1).argmax(-1)
