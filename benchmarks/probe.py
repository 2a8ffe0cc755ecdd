"""Linear probe and kNN beside scikit-learn's: seconds, and whether they agree.

    python benchmarks/probe.py [--train=50000] [--test=10000] [--features=512] [--classes=10]

Features are synthetic: overlapping Gaussian classes on scales from 0.1 to 10, the same on every
machine. The linear probe solves one problem, standardised features and strength 100, to its
minimum: ours by `evaluation.logistic`, theirs by LogisticRegression(C=0.01, tol=1e-4). kNN is
the weighted vote with cosines, k 20 and T 0.07; theirs is KNeighborsClassifier by brute force.
Prints a table: seconds without and with compilation (ours), seconds of scikit-learn, their ratio,
test accuracies and their difference, and for the probe how far the objective is above the lower of
the two. Both use what threads the machine allows; `taskset -c 0` compares single cores.

Accuracies of kNN are equal but for ties within float32's rounding.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from contrastive_jax import parallel
from contrastive_jax.evals import knn
from contrastive_jax.evaluation import logistic

STRENGTH, K, TEMPERATURE = 100.0, 20, 0.07


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


def objective(W: np.ndarray, b: np.ndarray, x: np.ndarray, label: np.ndarray) -> float:
    z = x.astype(np.float64) @ W + b
    loss = np.logaddexp.reduce(z, axis=1) - z[np.arange(len(x)), label]
    return float(loss.sum() + STRENGTH / 2 * (W**2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    for name, default in (('train', 50_000), ('test', 10_000), ('features', 512), ('classes', 10)):
        parser.add_argument(f'--{name}', type=int, default=default)
    args = parser.parse_args()
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    mesh = parallel.make_mesh()
    x, label = data(args.train - args.train % mesh.size, args.features, args.classes, 0)
    test, test_label = data(args.test - args.test % mesh.size, args.features, args.classes, 1)
    mean, std = x.mean(0), x.std(0)
    scaled, test_scaled = (x - mean) / std, (test - mean) / std
    put = parallel.shard_batch
    rows: dict[str, tuple] = {}

    ones = np.ones((len(x), 1), np.float32)
    given = put(mesh, {'x': np.concatenate([scaled, ones], 1), 'label': label})
    given |= put(mesh, {'fit': np.ones(len(x), bool)})

    def solve() -> logistic.Solution:
        with jax.set_mesh(mesh):
            return logistic.solve(
                given['x'][None],
                given['label'][None],
                given['fit'][None, None],
                ~given['fit'][None, None],
                np.full((1, 1), STRENGTH, np.float32),
                np.zeros((1, 1, args.features + 1, args.classes), np.float32),
                np.full((1, 1), 1e-6, np.float32),
                np.int32(1000),
            )

    first, _ = timed(solve)
    ours, solution = timed(solve)
    W = parallel.to_host(solution.W_SPDC)[0, 0].astype(np.float64)
    model = LogisticRegression(C=1 / STRENGTH, max_iter=1000, tol=1e-4)
    theirs, model = timed(lambda: model.fit(scaled, label))
    minima = [
        objective(*weights, scaled, label)
        for weights in ((W[:-1], W[-1]), (model.coef_.T.astype(np.float64), model.intercept_))
    ]
    found = ((test_scaled @ W[:-1] + W[-1]).argmax(1) == test_label).mean()
    expected = model.score(test_scaled, test_label)
    above = [f'{(m / min(minima) - 1):.0e}' for m in minima]
    rows['linear probe'] = (ours, first, theirs, found, expected, ' / '.join(above))

    given |= put(mesh, {'bank': x}) | put(mesh, {'query': test, 'own': test_label})

    def hits() -> jax.Array:
        with jax.set_mesh(mesh):
            found = knn.nearest(given['query'], given['bank'], given['fit'], k=K)
            voted = knn.classify(*found, given['label'], TEMPERATURE, classes=args.classes)
            return (voted == given['own']).sum()

    first, _ = timed(hits)
    ours, count = timed(hits)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / TEMPERATURE)

    options: Any = {'metric': 'cosine', 'weights': weights, 'algorithm': 'brute'}
    neighbours = KNeighborsClassifier(K, **options).fit(x, label)
    theirs, expected = timed(lambda: neighbours.score(test, test_label))
    rows['kNN'] = (ours, first, theirs, int(count) / len(test), expected, '')

    print(
        f'{len(x):,} x {args.features} train, {len(test):,} test, {args.classes} classes, '
        f'{mesh.size} {mesh.devices.flat[0].platform} device(s)\n'
    )
    print(
        '| | ours, s | with compilation | scikit-learn, s | theirs / ours | accuracy '
        '| scikit-learn | difference | objective above minimum, ours / theirs |'
    )
    print('|---|---|---|---|---|---|---|---|---|')
    for name, (ours, first, theirs, found, expected, above) in rows.items():
        print(
            f'| {name} | {ours:.2f} | {first:.2f} | {theirs:.2f} | {theirs / ours:.2f} '
            f'| {found:.4f} | {expected:.4f} | {found - expected:+.4f} | {above} |'
        )


if __name__ == '__main__':
    main()
