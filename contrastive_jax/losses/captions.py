"""Losses of images and their texts: softmax and sigmoid over all pairs, as reductions of
`similarity`.

Global batches, dtypes and sharding as in `contrastive`. Several images of a batch may have the same
text. `same_text` says what such an image and text are to each other:

- 'negative': as any other two. The papers' formula.
- 'mask': nothing; they are left out.
- 'positive': a pair, too.

B: pairs, D: embedding dimensions, T: tokens, m, n: a tile's.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from contrastive_jax import similarity
from contrastive_jax.losses.scores import (
    check_labels,
    check_pairs,
    check_positive,
    cosine,
    items,
    unit,
)
from contrastive_jax.similarity import TILE

SAME_TEXT = ('negative', 'mask', 'positive')


def clip(
    image_BD: jax.Array,
    text_BD: jax.Array,
    logit_scale: float | jax.Array,
    text_id_B: jax.Array | None = None,
    *,
    same_text: str = 'negative',
    record_B: jax.Array | None = None,
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """Softmax loss over pairs, in both directions (CLIP, Radford et al. 2021, figure 3).

    The mean of `−log exp(t·s_ii) / Σ_j exp(t·s_ij)` over images i and of the same over texts, with
    s the cosine. One pass over the scores serves both directions.

    With P(i) the pairs that have i's text, i among them, 'mask' leaves those of P(i) other than i
    out of the sum. 'positive' is MIL-NCE (Miech et al. 2020, arXiv:1912.06430, eq. 1),
    `−log Σ_{j ∈ P(i)} exp(t·s_ij) / Σ_j exp(t·s_ij)`, where the score of an image with a text equal
    to its own counts as the score with its own: their embeddings differ only by what the encoder
    draws. (The mean over positives outside of the logarithm, as in UniCL, Yang et al. 2022,
    arXiv:2204.03610, eq. 3, has for equal embeddings of equal texts the value and the gradient of
    'negative'.)

    Args:
        image_BD, text_BD: embeddings, row-aligned; need not be normalised.
        logit_scale: t > 0, the factor itself (the exponential of what CLIP learns): 1 / τ.
        text_id_B: integers, equal for equal texts; see `equal_rows`. None: all differ.
        same_text: 'negative', 'mask' or 'positive', see the module's docstring.
        record_B: integers; pairs of one record are no negatives of each other. None: all differ.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0; 0 for B = 1.

    Raises:
        ValueError: shapes that differ, a scale that is not above 0, ids or records that are no
            integers, an unknown `same_text`.

    >>> f'{clip(jnp.eye(2), jnp.eye(2), logit_scale=2.0):.4f}'
    '0.1269'
    """
    check_positive('clip', 'logit_scale', logit_scale)
    ids = _ids('clip', image_BD, text_BD, text_id_B, same_text, record_B)
    images, texts = {**ids, **items(image_BD)}, {**ids, **items(text_BD)}
    dtype = jnp.promote_types(image_BD.dtype, text_BD.dtype)
    how = {'tile': tile, 'exchange': exchange}

    def negatives(image: dict, text: dict) -> jax.Array:
        logits_mn = logit_scale * cosine(image, text, dtype)
        return jnp.where(_equal(image, text, *ids), -jnp.inf, logits_mn)

    over_texts_B, over_images_B = similarity.logsumexp_both(negatives, images, texts, **how)
    own_B = logit_scale * jnp.sum(unit(image_BD) * unit(text_BD), axis=-1)
    to_texts_B = to_images_B = own_B
    if same_text == 'positive':
        text = {'text': ids['text']}

        def positives(image: dict, text: dict) -> jax.Array:
            return jnp.where(_equal(image, text, 'text'), image['own'][:, None], -jnp.inf)

        to_texts_B, to_images_B = similarity.logsumexp_both(
            positives, {**text, 'own': own_B}, text, **how
        )
    losses_B = jax.nn.softplus(over_texts_B - to_texts_B)
    return jnp.mean(losses_B + jax.nn.softplus(over_images_B - to_images_B)) / 2


def siglip(
    image_BD: jax.Array,
    text_BD: jax.Array,
    logit_scale: float | jax.Array,
    logit_bias: float | jax.Array,
    text_id_B: jax.Array | None = None,
    *,
    same_text: str = 'negative',
    record_B: jax.Array | None = None,
    tile: int = TILE,
    exchange: str = 'auto',
) -> jax.Array:
    """Sigmoid loss over all pairs (SigLIP, Zhai et al. 2023, eq. 1).

    `−1/B Σ_ij log σ(z_ij (t·s_ij + b))` with s the cosine and z 1 for a pair, −1 otherwise. For an
    image and another one's text that equals its own, z is 1 with 'positive', and the term is
    absent with 'mask'.

    Args:
        image_BD, text_BD: embeddings, row-aligned; need not be normalised.
        logit_scale: t > 0, the factor itself (the exponential of what SigLIP learns).
        logit_bias: b.
        text_id_B, same_text, record_B: see `clip`.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0.

    Raises:
        ValueError: as `clip`.

    >>> f'{siglip(jnp.eye(2), jnp.eye(2), logit_scale=10.0, logit_bias=-10.0):.4f}'
    '0.6932'
    """
    check_positive('siglip', 'logit_scale', logit_scale)
    ids = _ids('siglip', image_BD, text_BD, text_id_B, same_text, record_B)
    images, texts = {**ids, **items(image_BD)}, {**ids, **items(text_BD)}
    dtype = jnp.promote_types(image_BD.dtype, text_BD.dtype)
    B = image_BD.shape[0]
    yes = ('pair', 'text') if same_text == 'positive' else ('pair',)

    def term(image: dict, text: dict) -> jax.Array:
        yes_mn = _equal(image, text, *yes)
        logits_mn = logit_scale * cosine(image, text, dtype) + logit_bias
        loss_mn = jax.nn.softplus(jnp.where(yes_mn, -logits_mn, logits_mn)) / B
        return jnp.where(~yes_mn & _equal(image, text, *ids), 0.0, loss_mn)

    return similarity.sum(term, images, texts, tile=tile, exchange=exchange)


def equal_rows(x_BT: jax.Array) -> jax.Array:
    """[B] int32, the same number for rows that are equal and for no others.

    Rows come next to each other by a hash of 64 bits and are then compared in full: rows that
    differ never share a number. Equal ones get two numbers only if a third row with their hash
    comes between them.

    Args:
        x_BT: integers, such as the token ids of texts.

    >>> a, b, c = equal_rows(jnp.array([[1, 2], [3, 4], [1, 2]]))
    >>> bool(a == c), bool(a == b)
    (True, False)
    """
    B, T = x_BT.shape
    # Odd numbers at random: sums of products modulo 2^32.
    factors_2T = jax.random.bits(jax.random.key(0), (2, T), jnp.uint32) | 1
    hashes_2B = jnp.sum(factors_2T[:, None] * x_BT.astype(jnp.uint32)[None], axis=-1)
    *_, order_B = lax.sort((*hashes_2B, jnp.arange(B, dtype=jnp.int32)), num_keys=2)
    sorted_BT = x_BT[order_B]
    new_B = jnp.any(sorted_BT != jnp.roll(sorted_BT, 1, axis=0), axis=1).at[0].set(False)
    return jnp.zeros(B, jnp.int32).at[order_B].set(jnp.cumsum(new_B, dtype=jnp.int32))


def _ids(
    loss: str,
    image_BD: jax.Array,
    text_BD: jax.Array,
    text_id_B: jax.Array | None,
    same_text: str,
    record_B: jax.Array | None,
) -> dict[str, jax.Array]:
    """Numbers of pairs: where one of them is equal, an image and a text are no negatives."""
    check_pairs(loss, image_BD, text_BD)
    if same_text not in SAME_TEXT:
        raise ValueError(f'{loss}: same_text must be one of {SAME_TEXT}, got {same_text!r}')
    pair_B = jnp.arange(image_BD.shape[0], dtype=jnp.int32)
    ids = {'pair': pair_B}
    if record_B is not None:
        ids['record'] = record_B
    if same_text != 'negative':
        ids['text'] = pair_B if text_id_B is None else text_id_B
    for id_B in ids.values():
        check_labels(loss, image_BD, id_B)
    return ids


def _equal(image: dict, text: dict, *names: str) -> jax.Array:
    """Which pairs [m, n] have the same number by any of the names."""
    equal = [image[name][:, None] == text[name][None, :] for name in names]
    return functools.reduce(jnp.logical_or, equal)
