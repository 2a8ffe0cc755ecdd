"""Accuracy of the classifier that a run has trained: supervised learning, fine-tuning, a probe.

n: test records, C: classes.
"""

from collections.abc import Iterator

import numpy as np

from contrastive_jax import evaluation, parallel
from contrastive_jax.evaluation import Evaluate, percent
from contrastive_jax.evaluation.subject import Subject


def make(label: str = 'label') -> Evaluate:
    """The share of test records whose class has the highest score, or one of the five highest.

    For methods whose `encode` gives 'logits' [B, C]. Others are evaluated by `linear` and `knn`,
    which learn from the training split.

    Args:
        label: the one of the data's labels that the classifier has learned.

    Returns:
        `evaluate(subject)`, which yields 'top1' and, of more than five classes, 'top5'; of equal
        scores each has the worst place. Nothing where there are no logits or no labels.
    """
    say = evaluation.missed("the classifier's accuracy")

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        if subject.weights is None:
            return
        if not subject.named(('logits*',), ''):
            say('the method trains none')
            return
        if reason := subject.missing(label):
            say(reason)
            return
        x_ND, label_N = subject.features('test', 'logits', label)
        logits_nC = parallel.to_host(x_ND)[label_N >= 0]
        label_n = label_N[label_N >= 0]
        known_n = label_n < logits_nC.shape[1]
        own_n = logits_nC[np.arange(len(label_n)), np.where(known_n, label_n, 0)]
        place_n = (~(logits_nC < own_n[:, None])).sum(1)  # what is not finite comes last
        title = evaluation.titled('classifier', label)
        yield 'top1', percent(np.mean(known_n & (place_n <= 1)), title)
        if logits_nC.shape[1] > 5:
            yield 'top5', percent(np.mean(known_n & (place_n <= 5)), f'{title}, top 5')

    return evaluate
