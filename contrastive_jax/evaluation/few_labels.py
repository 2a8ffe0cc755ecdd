"""Experiments with few labels: which subsets are drawn, and what they are called.

N: rows, n: labels of a class.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from contrastive_jax.config import check_range, each
from contrastive_jax.evaluation import percent


def named(per_class: Sequence[int], fractions: Sequence[float]) -> dict[str, int | float]:
    """Names of the experiments with few labels in metrics, and what `draws` takes for each.

    {'10_per_class': 10, '1_percent': 0.01}
    """
    named: dict[str, int | float] = {f'{n}_per_class': int(n) for n in per_class}
    return named | {f'{100 * f:g}_percent': float(f) for f in fractions}


def draws(label_N: np.ndarray, labels: int | float, count: int, seed: int) -> list[np.ndarray]:
    """Random stratified subsets of the labelled rows.

    Args:
        label_N: int; negative labels are never drawn.
        labels: an int: labels of each class in a subset; a class with fewer gives all it has. A
            float: the share of every class, rounded, at least one; of one seed and draw, the
            subset of a smaller share is part of a larger one's.
        count: how many subsets.
        seed: the same seed draws the same records, however many padding rows lie between them.

    Returns:
        `count` sorted arrays of row numbers, all of one length.
    """
    rows_of = [np.flatnonzero(label_N == c) for c in np.unique(label_N[label_N >= 0])]
    if isinstance(labels, float):
        sizes, stream = [max(1, round(labels * len(rows))) for rows in rows_of], 0
    else:
        sizes, stream = [labels] * len(rows_of), labels
    fewer = sum(len(rows) < size for rows, size in zip(rows_of, sizes, strict=True))
    if fewer:
        logging.info(
            '%d of %d classes have fewer than %d labelled records: all of them are used',
            fewer,
            len(rows_of),
            labels,
        )
    subsets = []
    for draw in range(count):
        rng = np.random.default_rng([seed, stream, draw])
        some = [rng.permutation(rows)[:n] for rows, n in zip(rows_of, sizes, strict=True)]
        subsets.append(np.sort(np.concatenate(some)))
    return subsets


def held_out(label_N: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: a random share of each class, rounded up, but never all of a class."""
    held_N = np.zeros(len(label_N), bool)
    rng = np.random.default_rng([seed, 0])
    for c in np.unique(label_N[label_N >= 0]):
        rows = rng.permutation(np.flatnonzero(label_N == c))
        held_N[rows[: min(int(np.ceil(fraction * len(rows))), len(rows) - 1)]] = True
    return held_N


def titled(name: str) -> str:
    """Words of the closing table for one of `named`.

    >>> titled('10_per_class'), titled('1_percent')
    ('10 labels per class', '1 % of labels')
    """
    amount, _, kind = name.partition('_')
    return f'{amount} labels per class' if kind == 'per_class' else f'{amount} % of labels'


def over_draws(name: str, values: Sequence[float], title: str) -> Iterator[tuple[str, float]]:
    """Mean and standard deviation of an accuracy over draws: `name` and `<name>_std`."""
    yield name, percent(float(np.mean(values)), title)
    yield f'{name}_std', float(np.std(values))


def check(
    where: str, per_class: Sequence[int], draws: int, fractions: Sequence[float] = ()
) -> None:
    """Raises UserError unless the options of the few-labels experiments make sense."""
    check_range(where, each('per_class', per_class), least=1, whole=True)
    check_range(where, each('fractions', fractions), above=0, most=1)
    if per_class or fractions:
        check_range(where, {'draws': draws}, least=1, whole=True)
