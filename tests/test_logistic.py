"""Logistic regression against scikit-learn's minima, on one, two and eight devices."""

import functools
import logging
import warnings

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from subjects import subject
from threadpoolctl import threadpool_limits

from contrastive_jax import parallel
from contrastive_jax.evals import linear
from contrastive_jax.evaluation import logistic

ROWS, TEST, WIDTH, CLASSES = 480, 400, 24, 4
KINDS = ('well-conditioned', 'collinear', 'scales')
DEVICES = (1, 2, 8)


@functools.cache
def features(kind: str) -> tuple[np.ndarray, ...]:
    """Raw features of overlapping classes: (train, labels, test, labels)."""
    rng = np.random.default_rng(3)
    label = rng.integers(0, CLASSES, ROWS + TEST).astype(np.int32)
    centres = rng.normal(size=(CLASSES, WIDTH))
    x = centres[label] * 0.8 + rng.normal(size=(ROWS + TEST, WIDTH))
    if kind == 'collinear':
        noise = rng.normal(size=x.shape) * np.geomspace(1e-3, 1e-1, WIDTH)
        x = x[:, :6] @ rng.normal(size=(6, WIDTH)) + noise
    elif kind == 'scales':
        # Skewed as well, so that standardising does not make them alike.
        x = np.exp(x * np.linspace(0.2, 2, WIDTH)) * np.geomspace(1e-3, 1e3, WIDTH)
    x = x.astype(np.float32)
    return x[:ROWS], label[:ROWS], x[ROWS:], label[ROWS:]


@functools.cache
def standardised(kind: str) -> tuple[np.ndarray, ...]:
    """The same with mean 0 and deviation 1 and a column of 1."""
    x, label, test_x, test_label = features(kind)
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)

    def scaled(x: np.ndarray) -> np.ndarray:
        return np.c_[(x - mean) / std, np.ones(len(x))].astype(np.float32)

    return scaled(x), label, scaled(test_x), test_label


def objective(W: np.ndarray, x: np.ndarray, label: np.ndarray, strength: float) -> float:
    W, x = W.astype(np.float64), x.astype(np.float64)
    z = x @ W
    loss = np.logaddexp.reduce(z, axis=1) - z[np.arange(len(x)), label]
    return loss.sum() + strength / 2 * (W[:-1] ** 2).sum()


def minimum(x: np.ndarray, label: np.ndarray, strength: float) -> float:
    """scikit-learn's, in float64."""
    model = LogisticRegression(C=1 / strength, solver='newton-cholesky', tol=1e-12, max_iter=1000)
    # One thread: on problems of this size BLAS's threads mostly wait for each other.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that float64 ends a line search
        model.fit(x[:, :-1].astype(np.float64), label)
    return objective(np.r_[model.coef_.T, model.intercept_[None]], x, label, strength)


@functools.cache
def minima(kind: str) -> dict[float, float]:
    x, label, *_ = standardised(kind)
    return {strength: minimum(x, label, strength) for strength in linear.STRENGTHS}


def solve(
    x: np.ndarray,
    label: np.ndarray,
    strength: float,
    W: np.ndarray,
    devices: int = 1,
    tolerance: float = 1e-9,
    most: int = 5000,
) -> logistic.Solution:
    """One problem, sharded over devices."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    rows = parallel.shard_batch(mesh, {'x': x})['x']
    every = np.ones((1, 1, len(x)), bool)
    full = functools.partial(np.full, (1, 1), dtype=np.float32)
    with jax.set_mesh(mesh):
        return logistic.to_host(
            logistic.solve(
                *(rows[None], label[None], every, ~every, full(strength), W[None, None]),
                *(full(tolerance), np.int32(most)),
            )
        )


def nothing(x: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    return np.zeros((x.shape[1], classes), np.float32)


@pytest.mark.parametrize('kind', KINDS)
def test_every_strength_reaches_scikit_learns_minimum_on_any_number_of_devices(kind):
    """Each starts where the one before it ended, as in the evaluator."""
    x, label, test_x, test_label = standardised(kind)
    hits: dict[int, list[int]] = {}
    for devices in DEVICES:
        W, hits[devices] = nothing(x), []
        for strength in linear.STRENGTHS:
            solution = solve(x, label, strength, W, devices)
            W = solution.W_SPDC[0, 0]
            found = objective(W, x, label, strength)
            assert found == pytest.approx(minima(kind)[strength], rel=1e-7), (devices, strength)
            assert solution.objective_SP[0, 0] == pytest.approx(found, rel=3e-6)
            assert solution.iterations < 5000
            hits[devices].append(int(((test_x @ W).argmax(1) == test_label).sum()))
    assert hits[1] == hits[2] == hits[8]


@pytest.mark.parametrize('kind', KINDS)
def test_the_strength_that_is_chosen_and_top1_do_not_depend_on_devices(kind, caplog):
    x, label, *test = features(kind)
    label = np.where(np.arange(ROWS) % 17 == 0, -1, label)
    encode = jax.jit(lambda batch: batch['image'])
    results = []
    for devices in DEVICES:
        given = subject(
            {'train': (x, label), 'test': tuple(test)},
            lambda batch, name, prepared=False: encode(batch),
            devices=devices,
            classes=list('abcd'),
        )
        caplog.clear()
        with caplog.at_level(logging.DEBUG, 'absl'):
            found = dict(linear.make(per_class=())(given))
        (said,) = [r.getMessage() for r in caplog.records if 'strength' in r.getMessage()]
        results.append((said, float(found['top1'])))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize('devices', DEVICES)
def test_a_warm_start_is_not_taken_for_the_minimum(devices):
    """A coarse tolerance is no reason to stop where the strength before ended: the gradient is
    short there, and the first step along it promises little, but the minimum is 2 % lower."""
    x, label, *_ = standardised('collinear')
    start = solve(x, label, 10.0, nothing(x), devices).W_SPDC[0, 0]
    least = minima('collinear')[0.1]
    assert objective(start, x, label, 0.1) > 1.02 * least
    W = solve(x, label, 0.1, start, devices, tolerance=1e-4).W_SPDC[0, 0]
    assert objective(W, x, label, 0.1) < (1 + 1e-4) * least


def test_losses_near_zero_are_told_apart():
    """Separable rows, where 1 − p is below float32's rounding of p."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 120).astype(np.int32)
    x = np.eye(3, 40)[label] * 8 + rng.normal(size=(120, 40))
    x = np.c_[x, np.ones(120)].astype(np.float32)
    W = nothing(x, 3)
    for strength in (1.0, 1e-2, 1e-4):
        solution = solve(x, label, strength, W)
        W = solution.W_SPDC[0, 0]
        assert objective(W, x, label, strength) == pytest.approx(
            minimum(x, label, strength), rel=1e-6
        )
        assert solution.objective_SP[0, 0] == pytest.approx(
            objective(W, x, label, strength), rel=1e-5
        )


def test_problems_side_by_side_are_those_alone():
    """Sets of other rows, problems of other rows and strengths, with rows that are left out."""
    x, label, *_ = standardised('scales')
    sets_x, sets_label = x.reshape(2, ROWS // 2, -1), label.reshape(2, -1)
    rng = np.random.default_rng(0)
    fit = rng.random((2, 3, ROWS // 2)) < 0.7
    strength = np.array([[100.0, 1.0, 0.1], [1.0, 10.0, 1000.0]], np.float32)
    W = np.zeros((2, 3, WIDTH + 1, CLASSES), np.float32)
    tolerance = np.full((2, 3), 1e-9, np.float32)
    solution = logistic.to_host(
        logistic.solve(sets_x, sets_label, fit, ~fit, strength, W, tolerance, np.int32(5000))
    )
    for s in range(2):
        for p in range(3):
            rows, labels, W = sets_x[s][fit[s, p]], sets_label[s][fit[s, p]], solution.W_SPDC[s, p]
            found = objective(W, rows, labels, strength[s, p])
            assert found == pytest.approx(minimum(rows, labels, strength[s, p]), rel=1e-7)
            held = objective(W, sets_x[s][~fit[s, p]], sets_label[s][~fit[s, p]], 0.0)
            assert solution.loss_SP[s, p] == pytest.approx(held, rel=1e-4)


def test_a_class_without_rows_and_a_constant_feature():
    x, label, *_ = standardised('well-conditioned')
    x = x.copy()
    x[:, 5] = 0
    W = solve(x, label, 1.0, nothing(x, CLASSES + 1)).W_SPDC[0, 0]
    assert np.isfinite(W).all()
    np.testing.assert_array_equal(W[5], 0)
    assert W[-1, CLASSES] < -10
    assert objective(W, x, label, 1.0) == pytest.approx(minimum(x, label, 1.0), rel=1e-6)


def test_what_float32_cannot_reach_does_no_harm():
    """Steps that only rounding promises end at max_iterations, still at the minimum."""
    x, label, *_ = standardised('well-conditioned')
    solution = solve(x, label, 0.1, nothing(x), tolerance=0.0, most=600)
    found = objective(solution.W_SPDC[0, 0], x, label, 0.1)
    assert found == pytest.approx(minima('well-conditioned')[0.1], rel=1e-9)
