"""The kNN classifier beside scikit-learn's: seconds, and whether they agree.

    python benchmarks/knn.py [--train=50000] [--test=10000] [--features=512] [--classes=10]

Features are synthetic: overlapping Gaussian classes on scales from 0.1 to 10, the same on every
machine. kNN is the weighted vote with cosines, k 20 and T 0.07; theirs is KNeighborsClassifier by
brute force. Prints a table: seconds without and with compilation (ours), seconds of scikit-learn,
their ratio, test accuracies and their difference. Both use what threads the machine allows;
`taskset -c 0` compares single cores.

Accuracies are equal but for ties within float32's rounding.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from contrastive_jax import parallel
from contrastive_jax.evals import knn

K, TEMPERATURE = 20, 0.07


def data(count: int, features: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [count, features] float32 and their labels."""
    centres = np.random.default_rng(0).normal(size=(classes, features))
    rng = np.random.default_rng([1, seed])
    label = rng.integers(0, classes, count)
    # Classes overlap whatever the number of features.
    x = centres[label] * 4 / features**0.5 + rng.normal(size=(count, features))
    return (x * np.geomspace(0.1, 10, features)).astype(np.float32), label.astype(np.int32)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = jax.block_until_ready(function())
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    for name, default in (('train', 50_000), ('test', 10_000), ('features', 512), ('classes', 10)):
        parser.add_argument(f'--{name}', type=int, default=default)
    args = parser.parse_args()
    from sklearn.neighbors import KNeighborsClassifier

    mesh = parallel.make_mesh()
    x, label = data(args.train - args.train % mesh.size, args.features, args.classes, 0)
    test, test_label = data(args.test - args.test % mesh.size, args.features, args.classes, 1)
    given = parallel.shard_batch(mesh, {'bank': x, 'label': label, 'use': np.ones(len(x), bool)})
    given |= parallel.shard_batch(mesh, {'query': test, 'own': test_label})

    def hits() -> jax.Array:
        with jax.set_mesh(mesh):
            found = knn.nearest(given['query'], given['bank'], given['use'], k=K)
            voted = knn.classify(*found, given['label'], TEMPERATURE, classes=args.classes)
            return (voted == given['own']).sum()

    first, _ = timed(hits)
    ours, count = timed(hits)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / TEMPERATURE)

    options: Any = {'metric': 'cosine', 'weights': weights, 'algorithm': 'brute'}
    neighbours = KNeighborsClassifier(K, **options).fit(x, label)
    theirs, expected = timed(lambda: neighbours.score(test, test_label))
    found = int(count) / len(test)
    print(
        f'{len(x):,} x {args.features} train, {len(test):,} test, {args.classes} classes, '
        f'{mesh.size} {mesh.devices.flat[0].platform} device(s)\n'
    )
    print(
        '| ours, s | with compilation | scikit-learn, s | theirs / ours | accuracy | scikit-learn '
        '| difference |\n|---|---|---|---|---|---|---|'
    )
    print(
        f'| {ours:.2f} | {first:.2f} | {theirs:.2f} | {theirs / ours:.2f} | {found:.4f} '
        f'| {expected:.4f} | {found - expected:+.4f} |'
    )


if __name__ == '__main__':
    main()
