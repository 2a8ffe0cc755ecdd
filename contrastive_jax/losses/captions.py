"""Losses of images and their texts: softmax and sigmoid over all pairs, as reductions of
`similarity`.

Global batches, dtypes and sharding as in `contrastive`. Several images of a batch may have the same
text. `same_text` says what such an image and text are to each other:

- 'negative': as any other two. The papers' formula.
- 'mask': nothing; they are left out.
- 'positive': a pair, too.

B: pairs, D: embedding dimensions, T: tokens, m, n: a tile's.
"""

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
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0; 0 for B = 1.

    Raises:
        ValueError: shapes that differ, a scale that is not above 0, ids that are no integers, an
            unknown `same_text`.

    >>> f'{clip(jnp.eye(2), jnp.eye(2), logit_scale=2.0):.4f}'
    '0.1269'
    """
    check_positive('clip', 'logit_scale', logit_scale)
    images, texts, dtype = _pairs('clip', image_BD, text_BD, text_id_B, same_text)
    left_out = 'pair' if same_text == 'negative' else 'text'
    how = {'tile': tile, 'exchange': exchange}

    def negatives(image: dict, text: dict) -> jax.Array:
        return jnp.where(
            _equal(left_out, image, text), -jnp.inf, logit_scale * cosine(image, text, dtype)
        )

    over_texts_B, over_images_B = similarity.logsumexp_both(negatives, images, texts, **how)
    own_B = logit_scale * jnp.sum(unit(image_BD) * unit(text_BD), axis=-1)
    to_texts_B = to_images_B = own_B
    if same_text == 'positive':
        ids = {'text': texts['text']}
        to_texts_B, to_images_B = similarity.logsumexp_both(
            lambda image, text: jnp.where(
                _equal('text', image, text), image['own'][:, None], -jnp.inf
            ),
            {**ids, 'own': own_B},
            ids,
            **how,
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
        text_id_B, same_text: see `clip`.
        tile, exchange: see `similarity.logsumexp`.

    Returns:
        float32 scalar, at least 0.

    Raises:
        ValueError: as `clip`.

    >>> f'{siglip(jnp.eye(2), jnp.eye(2), logit_scale=10.0, logit_bias=-10.0):.4f}'
    '0.6932'
    """
    check_positive('siglip', 'logit_scale', logit_scale)
    images, texts, dtype = _pairs('siglip', image_BD, text_BD, text_id_B, same_text)
    B = image_BD.shape[0]
    yes = 'text' if same_text == 'positive' else 'pair'

    def term(image: dict, text: dict) -> jax.Array:
        yes_mn = _equal(yes, image, text)
        logits_mn = logit_scale * cosine(image, text, dtype) + logit_bias
        loss_mn = jax.nn.softplus(jnp.where(yes_mn, -logits_mn, logits_mn)) / B
        if same_text == 'mask':
            loss_mn = jnp.where(_equal('text', image, text) & ~yes_mn, 0.0, loss_mn)
        return loss_mn

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


def _pairs(
    loss: str,
    image_BD: jax.Array,
    text_BD: jax.Array,
    text_id_B: jax.Array | None,
    same_text: str,
) -> tuple[dict, dict, jnp.dtype]:
    """Both sides' items with the numbers of their pair and of their text, and the wider dtype."""
    check_pairs(loss, image_BD, text_BD)
    if same_text not in SAME_TEXT:
        raise ValueError(f'{loss}: same_text must be one of {SAME_TEXT}, got {same_text!r}')
    ids = {'pair': jnp.arange(image_BD.shape[0], dtype=jnp.int32)}
    if same_text != 'negative':
        ids['text'] = ids['pair'] if text_id_B is None else text_id_B
        check_labels(loss, image_BD, ids['text'])
    dtype = jnp.promote_types(image_BD.dtype, text_BD.dtype)
    return {**ids, **items(image_BD)}, {**ids, **items(text_BD)}, dtype


def _equal(name: str, image: dict, text: dict) -> jax.Array:
    return image[name][:, None] == text[name][None, :]
