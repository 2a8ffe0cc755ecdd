"""Image–text retrieval: where an image's captions rank among all, and a caption's image.

Scores are whole numbers: unit rows are rounded to a grid on which float32 finds inner products
exactly, in any order of the sum. So equal rows tie and ranks are the same on any number of devices
and with any tile, which a rounded sum does not promise. Rounding the rows moves a cosine by about
6e-7 at 512 dimensions.

M: queries, N: candidates, D: embedding dimensions, P: pairs of a query and one of its own.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from contrastive_jax import evaluation, parallel, similarity
from contrastive_jax.config import UserError, check_range, each
from contrastive_jax.evaluation import Evaluate, percent
from contrastive_jax.evaluation.subject import Subject, put


def make(
    split: str = 'test', k: Sequence[int] = (1, 5, 10), tile: int = similarity.TILE
) -> Evaluate:
    """Recall at k and median rank, in both directions, over a whole split.

    The protocol of Flickr30K and of COCO's 5,000 test images: an image's rank is that of its best
    caption among all images' captions, its other captions left out; a caption's rank is that of
    its image. A candidate that scores the same as the right one ranks before it.

    Args:
        split: whose images and captions, any number an image. Images without captions and bad
            records are no candidates, either.
        k: how many candidates are looked at, from 1.
        tile: images and captions scored at a time; changes no result.

    Returns:
        `evaluate(subject)`, which yields for 'image_to_text' and 'text_to_image' each
        '<direction>_r<k>', the share of queries with a rank of at most k, and
        '<direction>_median_rank', from 1. Nothing where there are no texts.

    Raises:
        UserError: a value outside its range.

    Karpathy and Fei-Fei 2015, Deep Visual-Semantic Alignments, section 4.2.
    """
    check_k('config.evals.retrieval', k)
    check_range('config.evals.retrieval', {'tile': tile}, least=1, whole=True)
    say = evaluation.missed('Retrieval')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        reason, images_MD, captions = _pairs(subject, split)
        if reason:
            say(reason)
            return
        texts_ND = embed(subject, [text for own in captions for text in own])
        image_M = np.arange(len(captions))
        image_N = np.repeat(image_M, [len(own) for own in captions])
        sides = {
            'image_to_text': (images_MD, image_M, texts_ND, image_N),
            'text_to_image': (texts_ND, image_N, images_MD, image_M),
        }
        for direction, (x_MD, group_M, y_ND, group_N) in sides.items():
            rank_M = ranks(subject.mesh, x_MD, group_M, y_ND, group_N, tile)
            for n in k:
                title = f'retrieval, {direction.replace("_", " ")}, R@{n}'
                yield f'{direction}_r{n}', percent((rank_M <= n).mean(), title)
            yield f'{direction}_median_rank', float(np.median(rank_M))

    return evaluate


def _pairs(subject: Subject, split: str) -> tuple[str, np.ndarray, list[list[str]]]:
    """(why there is nothing to evaluate or '', embeddings of images that count, their captions)."""
    nothing = np.zeros((0, 0)), []
    if not subject.reads_text:
        return 'the encoder reads no text', *nothing
    if split not in subject.splits:
        return f'there is no {split} split', *nothing
    captions = subject.captions(split)
    if captions is None:
        return f'the {split} split has no captions', *nothing
    x_MD = parallel.to_host(subject.features(split, 'embedding').x_ND)[: len(captions)]
    # A picture that could not be decoded is a row of zeros.
    kept = np.flatnonzero([len(own) > 0 for own in captions] & (x_MD != 0).any(axis=1))
    if not len(kept):
        return f'no image of the {split} split has a caption', *nothing
    return '', x_MD[kept], [captions[i] for i in kept]


def embed(subject: Subject, texts: Sequence[str]) -> np.ndarray:
    """[len(texts), D] on the host; a text that occurs twice is encoded once, and so ties."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return parallel.to_host(subject.texts(list(place)))[[place[text] for text in texts]]


def check_k(where: str, k: Sequence[int]) -> None:
    """Raises UserError unless these are numbers of candidates."""
    if not k:
        raise UserError(f'{where}.k: got none; expected whole numbers of at least 1.')
    check_range(where, each('k', k), least=1, whole=True)


def ranks(
    mesh: Mesh,
    query_MD: np.ndarray,
    group_M: np.ndarray,
    bank_ND: np.ndarray,
    group_N: np.ndarray,
    tile: int = similarity.TILE,
) -> np.ndarray:
    """1 + how many candidates of another group score at least what the best of the query's does.

    Args:
        mesh: over which both sides are sharded.
        query_MD: embeddings of any length, on every host. What is not finite scores 0.
        group_M: int, from 0; each has a candidate.
        bank_ND: embeddings of the candidates.
        group_N: int, from 0.
        tile: of `similarity.count`.

    Returns:
        int [M].
    """
    query, bank = _grid(query_MD), _grid(bank_ND)
    own_M2 = _best(query, group_M, bank, group_N)
    rows, group_rows = put(mesh, np.concatenate([query, own_M2], 1), group_M)
    with jax.set_mesh(mesh):
        others = _others(rows, group_rows, *put(mesh, bank, group_N), tile=tile)
    return 1 + parallel.to_host(others)[: len(query)]


def _grid(x_ND: np.ndarray) -> np.ndarray:
    """Rows [h, l] of whole numbers, [N, 2D] float32: h + l / fine is the row at length 4096 − √D.

    As |h| ≤ 4096 and |l| ≤ 2048 (lengths; each number in l is at most 2048 / √D), no part of a sum
    h·h′, h·l′ + l·h′ or l·l′ exceeds 2²⁴ (Cauchy and Schwarz): float32 adds them up exactly.
    """
    x_ND = np.where(np.isfinite(x_ND).all(axis=1, keepdims=True), x_ND, 0).astype(np.float64)
    norm_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    x_ND *= (4096 - math.sqrt(x_ND.shape[1])) / np.where(norm_N1 > 0, norm_N1, 1)
    h_ND = np.rint(x_ND)
    l_ND = np.rint((x_ND - h_ND) * _fine(x_ND.shape[1]))
    return np.concatenate([h_ND, l_ND], 1).astype(np.float32)


def _fine(D: int) -> int:
    """Steps of l that make one of h."""
    return max(1, int(4096 / math.sqrt(D)) - 1)


def _best(
    query: np.ndarray, group_M: np.ndarray, bank: np.ndarray, group_N: np.ndarray
) -> np.ndarray:
    """The highest score of every query with candidates of its group, [M, 3] as in `_others`."""
    order = np.argsort(group_N, kind='stable')
    first_M, last_M = (np.searchsorted(group_N[order], group_M, side) for side in ('left', 'right'))
    count_M = last_M - first_M
    query_P = np.repeat(np.arange(len(query)), count_M)
    nth_P = np.arange(len(query_P)) - np.repeat(np.cumsum(count_M) - count_M, count_M)
    bank_P = order[first_M[query_P] + nth_P]
    D, best_M = query.shape[1] // 2, np.full(len(query), -np.inf)
    fine = _fine(D)
    for start in range(0, len(query_P), 2**14):
        some = slice(start, start + 2**14)
        a, b = (x.astype(np.float64) for x in (query[query_P[some]], bank[bank_P[some]]))
        score = np.einsum('pd,pd->p', a[:, :D] * fine + a[:, D:], b[:, :D] * fine + b[:, D:])
        np.maximum.at(best_M, query_P[some], score)
    high_M, rest_M = np.divmod(best_M, fine**2)
    return np.stack([high_M, *np.divmod(rest_M, fine)], 1).astype(np.float32)


@functools.partial(jax.jit, static_argnames='tile')
def _others(
    rows: jax.Array, group_M: jax.Array, bank: jax.Array, group_N: jax.Array, *, tile: int
) -> jax.Array:
    """Counts candidates of another group that score at least (high · fine + middle) · fine + low.

    Args:
        rows: [M, 2D + 3] queries of `_grid`, and their high, middle and low.
        group_M: of the queries.
        bank: [N, 2D] candidates of `_grid`.
        group_N: of the candidates; −1 is padding.
        tile: of `similarity.count`.
    """
    D = bank.shape[1] // 2
    fine = _fine(D)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)

    def before(rows: tuple[jax.Array, ...], bank: tuple[jax.Array, ...]) -> jax.Array:
        (x, group_m), (y, group_n) = rows, bank
        x, high, middle, low = jnp.split(x, [2 * D, 2 * D + 1, 2 * D + 2], axis=1)
        # Differences first: where they decide they are small, and all of this is exact.
        more = (product(x[:, :D], y[:, :D]) - high) * fine
        more += product(x, jnp.roll(y, D, axis=1)) - middle
        reaches = more * fine >= low - product(x[:, D:], y[:, D:])
        return reaches & (group_m[:, None] != group_n[None, :]) & (group_n >= 0)[None, :]

    return similarity.count(before, (rows, group_M), (bank, group_N), tile=tile)
