"""The base of evaluators: an encoder and the data to try it on, measures, draws of few labels.

n: rows, h w: a map of patches, H W: an image, C: channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from absl import logging

from contrastive_jax.inputs import Batch

if TYPE_CHECKING:
    from contrastive_jax.evaluation.subject import Subject

PERCENT = '%'


class Measure(float):
    """A number that an evaluator has found, which says how to print it.

    Attributes:
        title: its row in the closing table.
        unit: PERCENT, of a fraction in [0, 1]; or what follows the number: 'dB'; or ''.
    """

    title: str
    unit: str

    def __new__(cls, value: float, title: str, unit: str = '') -> 'Measure':
        self = super().__new__(cls, value)
        self.title, self.unit = title, unit
        return self


def percent(value: float, title: str) -> Measure:
    """A share in [0, 1], such as an accuracy."""
    return Measure(value, title, PERCENT)


def titled(evaluator: str, label: str) -> str:
    """Title of an evaluator of one of the data's labels: both names, unless it is 'label'.

    >>> titled('knn', 'label'), titled('knn', 'speaker')
    ('knn', 'knn, speaker')
    """
    return evaluator if label == 'label' else f'{evaluator}, {label}'


class Asked(NamedTuple):
    """A method's own task, of some weights: see `method.Task`.

    Attributes:
        score: jitted `(batch) -> {name: [B] float}`, sharded on B, of a batch as
            `inputs.task.device`, or else `inputs.eval.device` takes it.
        units: of the results by their names.
    """

    score: Callable[[Batch], dict[str, jax.Array]]
    units: Mapping[str, str]


# An evaluator yields numbers, those with a title as Measures, and figures, the bytes of PNG files.
Evaluate = Callable[['Subject'], Iterator[tuple[str, float | bytes]]]


def spread(size: int, count: int) -> np.ndarray:
    """At most `count` of range(size), evenly spread over it."""
    count = min(count, size)
    return (2 * np.arange(count) + 1) * size // (2 * max(count, 1))


def grid(images_nHWC: np.ndarray, patches: int) -> tuple[int, int]:
    """(rows, columns) of the square patches that the images divide into."""
    height, width = images_nHWC.shape[1:3]
    side = math.sqrt(height * width / patches)
    return round(height / side), round(width / side)


def missed(what: str) -> Callable[[str], None]:
    """`say(reason)`: logs why `what` is not evaluated, each reason once."""
    said: set[str] = set()

    def say(reason: str) -> None:
        if reason not in said:
            logging.info('%s is not evaluated: %s', what, reason)
            said.add(reason)

    return say
