"""A method's own task on held-out records: which turn, which neighbour, which order.

How well it is solved says whether training works, not whether features are good: where it rises
while probes fall, the encoder has found a shortcut, or has become too special.

N: records (with padding), K: results and a count.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax import evaluation
from contrastive_jax.config import choose
from contrastive_jax.evaluation import Evaluate, Measure
from contrastive_jax.evaluation.subject import Subject
from contrastive_jax.inputs import Batch

SPLITS = 'test', 'validation', 'train'


def make(split: str = 'test') -> Evaluate:
    """The results of the method's task, mean over records.

    What is asked about a record is the same at every evaluation, and records are as evaluators see
    them: not augmented.

    Args:
        split: of the records; another one than 'test' tells how far they are known by heart.

    Returns:
        `evaluate(subject)`, which yields every result that the method's `Task` names: 'accuracy'.

    Raises:
        UserError: a split that no data have.
    """
    choose('split', split, dict.fromkeys(SPLITS), 'config.evals.pretext')
    say = evaluation.missed('the pretext task')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float | bytes]]:
        if split not in subject.splits:
            say(f'there is no {split} split')
            return
        if subject.task is None:
            say('there is none: the baseline, or a method that asks nothing of single records')
            return
        score, units = subject.task

        def joined(batch: Batch) -> jax.Array:
            found = score(batch)
            columns = [found[name].astype(jnp.float32) for name in units]
            # Beside the results 1, which `through` makes 0 of a record that does not count.
            return jnp.stack([*columns, jnp.ones_like(columns[0])], axis=1)

        x_NK, _ = subject.through(subject.splits[split], joined, subject.inputs.task)
        means_K = x_NK.sum(0, np.float64) / max(x_NK[:, -1].sum(), 1)
        called = 'pretext' if split == 'test' else f'pretext, {split} split'
        for mean, (name, unit) in zip(means_K, units.items(), strict=False):
            yield name, Measure(mean, f'{called}, {name}', unit)

    return evaluate
