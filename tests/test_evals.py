"""Evaluators against scikit-learn, on one device and on eight."""

import logging
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from sklearn import datasets
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from subjects import subject
from threadpoolctl import threadpool_limits

from contrastive_jax.config import UserError
from contrastive_jax.evals import collapse, knn, linear
from contrastive_jax.evaluation import few_labels
from contrastive_jax.evaluation.subject import Subject

CLASSES = 5


def blobs(seed: int, n: int, width: int = 12, spread: float = 2.0):
    """Features of overlapping classes on a scale of their own, with a constant column."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    centres = np.random.default_rng(99).normal(size=(CLASSES, width))
    x = centres[label] + rng.normal(size=(n, width)) * spread
    x = x * np.geomspace(0.1, 30, width) + np.linspace(-5, 50, width)
    x[:, 3] = 7.25
    return x.astype(np.float32), label


def encoder(splits, devices=1, batch=48, classes=CLASSES, calls=None) -> Subject:
    """A Subject whose records hold the features."""

    @jax.jit
    def encode(batch):
        return batch['image']

    def counted(batch, name, prepared=False):
        assert name == 'features'
        if calls is not None:
            calls.append(1)
        return encode(batch)

    names = [str(c) for c in range(classes)]
    return subject(splits, counted, devices=devices, batch=batch, classes=names)


# --- Subject -------------------------------------------------------------------------------------


@pytest.mark.parametrize('devices', [1, 8])
def test_any_output_of_given_images(devices):
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 4, 3)).astype(np.uint8)
    encode = jax.jit(lambda batch, name: {'halves': batch['image'].reshape(-1, 2, 24) / 2}[name],
                     static_argnums=1)  # fmt: skip
    e = subject({'test': (images, np.zeros(70))}, encode, devices=devices)
    np.testing.assert_array_equal(
        e.of({'image': images}, 'halves'), images.reshape(70, 2, 24) / np.float32(2)
    )
    with pytest.raises(KeyError, match='quarters'):
        e.of({'image': images}, 'quarters')


@pytest.mark.parametrize('devices', [1, 8])
def test_features_are_whole_in_order_and_computed_once(devices):
    x, label = blobs(0, 100)
    calls = []
    e = encoder({'train': (x, label)}, devices, calls=calls)
    features = e.features('train')
    assert e.features('train').x_ND is features.x_ND
    assert len(calls) == 3
    assert features.x_ND.shape == (144, 12)
    assert len(features.x_ND.addressable_shards) == devices
    assert len({s.index[0].start for s in features.x_ND.addressable_shards}) == devices
    np.testing.assert_array_equal(np.asarray(features.x_ND)[:100], x)
    np.testing.assert_array_equal(features.label_N, np.r_[label, np.full(44, -1)])
    assert features.label_N.dtype == np.int32
    assert np.isfinite(np.asarray(features.x_ND)).all()


def test_labelled_joins_train_and_validation():
    train, validation = blobs(0, 50), blobs(1, 30)
    e = encoder({'train': train, 'validation': validation}, 8)
    both = e.labelled()
    kept = both.label_N >= 0
    np.testing.assert_array_equal(np.asarray(both.x_ND)[kept], np.r_[train[0], validation[0]])
    np.testing.assert_array_equal(both.label_N[kept], np.r_[train[1], validation[1]])


def test_draws_are_balanced_repeatable_and_blind_to_padding(caplog):
    label = np.repeat([0, 1, 2], [50, 40, 30]).astype(np.int32)
    subsets = few_labels.draws(label, 10, 4, seed=3)
    assert all((np.bincount(label[rows]) == 10).all() for rows in subsets)
    assert len({tuple(rows) for rows in subsets}) == 4
    again = few_labels.draws(label, 10, 4, seed=3)
    np.testing.assert_array_equal(subsets, again)
    padded = np.r_[label[:70], [-1] * 5, label[70:], [-1] * 9]
    where = np.flatnonzero(padded >= 0)
    for rows, other in zip(subsets, few_labels.draws(padded, 10, 4, seed=3), strict=True):
        np.testing.assert_array_equal(where[rows], other)
    with caplog.at_level(logging.INFO, 'absl'):
        (rows,) = few_labels.draws(np.repeat([0, 1], [20, 4]), 10, 1, seed=0)
    assert list(np.bincount(np.repeat([0, 1], [20, 4])[rows])) == [10, 4]
    assert '1 of 2 classes' in caplog.text


# --- kNN -----------------------------------------------------------------------------------------


def sklearn_knn(train, test, k, temperature):
    def weights(distance):
        return np.exp((1 - distance) / temperature)

    options: Any = {'metric': 'cosine', 'weights': weights, 'algorithm': 'brute'}
    model = KNeighborsClassifier(k, **options)
    return model.fit(*train).score(*test)


@pytest.mark.parametrize(
    ('devices', 'k', 'temperature'), [(1, 1, 0.07), (1, 20, 0.07), (8, 20, 0.5), (8, 10**6, 0.02)]
)
def test_knn_is_sklearn(devices, k, temperature):
    train, test = blobs(0, 300), blobs(1, 130)
    found = dict(
        knn.make(k, temperature, draws=3, seed=5)(encoder({'train': train, 'test': test}, devices))
    )
    wide = [part.astype(np.float64) for part in (train[0], test[0])]
    train, test = (wide[0], train[1]), (wide[1], test[1])
    assert found['top1'] == sklearn_knn(train, test, min(k, 300), temperature)
    few = [
        sklearn_knn((train[0][r], train[1][r]), test, min(k, len(r)), temperature)
        for r in few_labels.draws(train[1], 10, 3, seed=5)
    ]
    assert found['top1_10_per_class'] == pytest.approx(np.mean(few), abs=1e-12)
    assert found['top1_10_per_class_std'] == pytest.approx(np.std(few), abs=1e-12)


def test_knn_bank_includes_validation():
    train, validation, test = blobs(0, 60), blobs(2, 90), blobs(1, 100)
    splits = {'train': train, 'validation': validation, 'test': test}
    found = dict(knn.make(7, 0.1, per_class=())(encoder(splits, 8)))
    both = np.r_[train[0], validation[0]], np.r_[train[1], validation[1]]
    assert found == {'top1': sklearn_knn(both, test, 7, 0.1)}


def test_knn_ignores_unlabelled_rows():
    (x, label), test = blobs(0, 200), blobs(1, 90)
    some = label.copy()
    some[::3] = -1
    test[1][::4] = -1
    found = dict(knn.make(9, 0.1, per_class=())(encoder({'train': (x, some), 'test': test})))
    kept = test[1] >= 0
    expected = sklearn_knn((x[some >= 0], label[some >= 0]), (test[0][kept], test[1][kept]), 9, 0.1)
    assert found['top1'] == expected


# --- linear --------------------------------------------------------------------------------------


def sklearn_linear(x, label, strength):
    # One thread: on problems of this size BLAS's threads mostly wait for each other.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter('ignore')
        model = LogisticRegression(C=1 / strength, tol=1e-6, max_iter=5000)
        return model.fit(x.astype(np.float64), label)


def digits() -> tuple[Any, Any]:
    """Digits through a random layer of 96 features, as an untrained encoder would."""
    bunch: Any = datasets.load_digits()
    x, label = bunch.data, bunch.target
    W = np.random.default_rng(0).normal(size=(64, 96)) / 8
    x = np.maximum(x @ W, 0).astype(np.float32)
    return (x[:1300], label[:1300].astype(np.int32)), (x[1300:], label[1300:].astype(np.int32))


def reference(train, test, held, strengths, few, folds):
    """The protocol of linear.py by scikit-learn: (top1, top1 with few labels)."""
    scaler = StandardScaler().fit(train[0].astype(np.float64))
    x, y, test_x = scaler.transform(train[0]), train[1], scaler.transform(test[0])

    def best(problems):
        scores = []
        for strength in strengths:
            loss = 0.0
            for fit, hold in problems:
                model = sklearn_linear(x[fit], y[fit], strength)
                probability = model.predict_proba(x[hold])
                loss -= np.log(probability[np.arange(len(hold)), y[hold]]).sum()
            scores.append((loss, strength))
        return min(scores)[1]

    everything = np.arange(len(y))
    strength = best([(np.flatnonzero(~held), np.flatnonzero(held))])
    top1 = sklearn_linear(x[everything], y, strength).score(test_x, test[1])
    each = []
    for rows in few:
        held_n = linear.folds(y[rows], folds)
        strength = best([(rows[~h], rows[h]) for h in held_n])
        each.append(sklearn_linear(x[rows], y[rows], strength).score(test_x, test[1]))
    return top1, each


@pytest.mark.parametrize('validation', [False, True])
def test_linear_is_sklearns_protocol(validation):
    train, test = blobs(0, 240), blobs(1, 400)
    strengths = (100.0, 1.0)
    if validation:
        splits = {'train': tuple(p[:192] for p in train), 'test': test}
        splits['validation'] = tuple(p[192:] for p in train)
        held = np.arange(240) >= 192
    else:
        splits = {'train': train, 'test': test}
        held = few_labels.held_out(train[1], 0.1, seed=2)
    few = few_labels.draws(train[1], 10, 2, seed=2)
    expected = reference(train, test, held, strengths, few, folds=5)
    results = [
        dict(linear.make(strengths, draws=2, seed=2)(encoder(splits, devices)))
        for devices in (1, 8)
    ]
    for found in results:
        assert found['top1'] == pytest.approx(expected[0], abs=0.0026)
        assert found['top1_10_per_class'] == pytest.approx(np.mean(expected[1]), abs=0.0026)
        assert found['top1_10_per_class_std'] == pytest.approx(np.std(expected[1]), abs=0.0026)
    one, eight = results
    assert one.pop('top1') == pytest.approx(eight.pop('top1'), abs=0.0026)
    assert one == eight  # few labels: summed in float64, solved on one device


def test_linear_with_more_features_than_labels():
    """The coordinates in the span of the rows lose nothing, and one label a class is enough."""
    train, test = digits()
    found = dict(
        linear.make(strengths=(1.0,), per_class=(1, 2), draws=1)(
            encoder({'train': train, 'test': test}, batch=433, classes=10)
        )
    )
    scaler = StandardScaler().fit(train[0].astype(np.float64))
    x, test_x = scaler.transform(train[0]), scaler.transform(test[0])
    for per_class in (1, 2):
        (rows,) = few_labels.draws(train[1], per_class, 1, seed=0)
        expected = sklearn_linear(x[rows], train[1][rows], 1.0).score(test_x, test[1])
        assert found[f'top1_{per_class}_per_class'] == pytest.approx(expected, abs=0.0021)


def test_held_out_rows_and_folds_are_stratified():
    label = np.repeat([0, 1, 2, -1], [50, 7, 1, 30])
    held = few_labels.held_out(label, 0.1, seed=0)
    assert list(np.bincount(label[held], minlength=3)) == [5, 1, 0]
    np.testing.assert_array_equal(held, few_labels.held_out(label, 0.1, seed=0))
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 10))
    held = linear.folds(label, 5)
    assert held.shape == (5, 40)
    assert (held.sum(0) == 1).all()
    assert all((np.bincount(label[h]) == 2).all() for h in held)


def test_linear_says_when_it_is_not_solved(caplog):
    splits = {'train': blobs(0, 240), 'test': blobs(1, 400)}
    with caplog.at_level(logging.WARNING, 'absl'):
        dict(linear.make((1e-2,), per_class=(), max_iterations=2)(encoder(splits)))
    assert 'max_iterations=2' in caplog.text


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('module', [knn, linear])
@pytest.mark.parametrize('why', ['no classes', 'no labels', 'no test'])
def test_unlabelled_data_is_said_once(module, why, caplog):
    x, label = blobs(0, 60)
    label[:] = -1
    splits = {'train': (x, label)} | ({} if why == 'no test' else {'test': (x, label)})
    e = encoder(splits, classes=0 if why == 'no classes' else CLASSES)
    evaluate = module.make()
    with caplog.at_level(logging.INFO, 'absl'):
        assert list(evaluate(e)) == list(evaluate(e)) == []
    assert len(caplog.records) == 1
    assert 'not evaluated' in caplog.text


def test_wrong_options_are_refused():
    for make, key, value in [
        (knn.make, 'k', 0),
        (knn.make, 'temperature', 0.0),
        (knn.make, 'per_class', (0,)),
        (linear.make, 'draws', 0),
        (linear.make, 'strengths', ()),
        (linear.make, 'strengths', (1.0, -1.0)),
        (linear.make, 'validation_fraction', 1.0),
        (linear.make, 'max_iterations', 0),
    ]:
        with pytest.raises(UserError, match=key):
            make(**{key: value})


# --- collapse ------------------------------------------------------------------------------------


@pytest.mark.parametrize('devices', [1, 8])
def test_collapse_is_the_formula(devices):
    x, label = blobs(3, 100)
    splits = {'train': (x, label), 'test': (x[:77], label[:77])}
    found = dict(collapse.make()(encoder(splits, devices)))
    x = x[:77].astype(np.float64)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert found['std'] == pytest.approx(z.std(0).mean() * np.sqrt(12), rel=1e-4)
    share = np.linalg.svd(x, compute_uv=False)
    share /= share.sum()
    assert found['rank'] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-2)


def test_collapse_at_its_ends():
    even = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    one = np.ones((64, 16), np.float32)
    label = np.zeros(4000, np.int32)
    spread = dict(collapse.make()(encoder({'train': (even, label)}, devices=8)))
    gone = dict(collapse.make()(encoder({'train': (one, label[:64])}, devices=8)))
    assert spread['std'] == pytest.approx(1, abs=0.02)
    assert spread['rank'] > 15.9
    assert gone['std'] == pytest.approx(0, abs=1e-3)
    assert gone['rank'] == pytest.approx(1, abs=0.05)
