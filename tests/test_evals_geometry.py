"""Clusters, uniformity and alignment against scikit-learn and the paper's formulas in NumPy."""

import itertools
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score
from subjects import subject
from test_evals import blobs, encoder

from contrastive_jax import parallel
from contrastive_jax.config import UserError
from contrastive_jax.data import Subset, open_splits
from contrastive_jax.evals import clustering, uniformity
from contrastive_jax.evaluation.subject import Subject
from contrastive_jax.experiment import build_inputs
from contrastive_jax.inputs import Transform

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('devices', [1, 8])
def test_clusters_that_are_classes(devices):
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat([0, 1, 3, -1], [40, 31, 20, 12])).astype(np.int32)
    x = (np.eye(4, 8)[label] * 6 + rng.normal(size=(103, 8)) * 0.5).astype(np.float32)
    x[label < 0] = 100
    splits = {'train': (x, label), 'test': (x, label)}
    found = dict(clustering.make(restarts=5)(encoder(splits, devices)))
    assert found == {'accuracy': 1.0, 'nmi': pytest.approx(1.0)}


def test_of_several_restarts_the_tightest_counts_whatever_the_devices():
    """Overlapping classes: the numbers are those of the clusters that are found, on 1 and 8."""
    train, test = blobs(0, 50), blobs(1, 203, spread=1.0)
    splits = {'train': train, 'test': test}
    evaluate = clustering.make(restarts=4, iterations=20)
    found = dict(evaluate(encoder(splits, 8)))
    e = encoder(splits)
    assert found == dict(evaluate(e))
    x_ND, label_N = e.features('test')
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(4)]
    runs = [clustering._kmeans(x_ND, label_N >= 0, k, k=5, iterations=20) for k in keys]
    assert len({float(spread) for _, spread in runs}) > 1
    cluster_N = np.asarray(min(runs, key=lambda run: float(run[1]))[0])[:203]
    assert found['nmi'] == pytest.approx(normalized_mutual_info_score(test[1], cluster_N))
    assert found['accuracy'] == clustering.matched(test[1], cluster_N)


def test_matching_is_the_best_of_all():
    rng = np.random.default_rng(0)
    label, cluster = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    best = max((np.array(p)[cluster] == label).mean() for p in itertools.permutations(range(4)))
    assert clustering.matched(label, cluster) == best
    # More clusters than classes: those that stand for none are wrong.
    assert clustering.matched(np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])) == 0.75


def formulas(x: np.ndarray, label: np.ndarray, t: float) -> tuple[float, float]:
    z = x.astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    square = ((z[:, None] - z[None]) ** 2).sum(2)
    i, j = np.triu_indices(len(z), 1)
    same = label[i] == label[j]
    return np.log(np.exp(-t * square[i, j]).mean()), square[i, j][same].mean()


@pytest.mark.parametrize(('devices', 't'), [(1, 2.0), (8, 2.0), (8, 0.5)])
def test_uniformity_is_the_papers(devices, t):
    x, label = blobs(3, 101)
    splits = {'train': (x, label), 'test': (x[:77], label[:77])}
    found = dict(uniformity.make(t=t)(encoder(splits, devices)))
    assert found.keys() == {'uniformity', 'class_alignment'}  # no pictures, so no views
    expected = formulas(x[:77], label[:77], t)
    assert found['uniformity'] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    assert found['class_alignment'] == pytest.approx(expected[1], rel=1e-4)


def test_uniformity_at_its_ends():
    one = np.ones((40, 16), np.float32)
    label = np.full(40, -1, np.int32)
    assert dict(uniformity.make()(encoder({'train': (one, label)}))) == {
        'uniformity': pytest.approx(0, abs=1e-6)
    }
    # Two opposite poles: a pair is at distance 0 or 4.
    poles = np.repeat([[1.0, 0.0], [-1.0, 0.0]], 20, 0).astype(np.float32)
    found = dict(uniformity.make()(encoder({'train': (poles, label)}, 8)))
    expected = np.log((2 * 190 + 400 * np.exp(-8)) / 780)
    assert found['uniformity'] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('views', [1, 2, 3])
def test_alignment_is_that_of_the_views(views):
    """Of two views, of two draws of one, and of the first two of three."""
    x, label = blobs(0, 70)
    asked: list[int] = []
    made = np.random.default_rng(0).normal(size=(70, 2 * views, 12)).astype(np.float32)

    def host(record: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        (row,) = np.flatnonzero((x == record['image']).all(1))
        draw = asked.count(row)
        asked.append(row)
        # The seed and the record's number alone decide what is drawn.
        first = np.random.default_rng([0, row]).random(2)
        assert rng.random() == first[draw]
        return {'views': made[row, draw * views : (draw + 1) * views]}

    shape = jax.ShapeDtypeStruct((views, 12), np.float32)
    train = Transform(host, {'views': shape}, lambda key, batch: {'views': 2 * batch['views']})
    e = subject(
        {'train': (x, label), 'test': (x, label)},
        lambda batch, name, prepared=False: batch['image'],
        devices=8,
        train=train,
    )
    found = dict(uniformity.make(images=67)(e))
    assert len(set(asked)) == 67
    z = made[sorted(set(asked))][:, :2].astype(np.float64)
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    assert found['alignment'] == pytest.approx(((z[:, 0] - z[:, 1]) ** 2).sum(1).mean(), rel=1e-5)
    asked.clear()
    assert 'alignment' not in dict(uniformity.make(images=0)(e))
    assert not asked


@pytest.mark.parametrize('recipe', ['simclr_vit', 'clip_vit', 'dino'])
def test_views_are_the_runs_own(recipe):
    """Whole crops without augmentation are the images, whose distance is nothing."""
    config = runpy.run_path(str(ROOT / f'configs/{recipe}.py'))['get_config']()
    splits = {'test': Subset(open_splits(config.data)['test'], range(0, 40, 2))}

    def alignment(config: Any, seed: int) -> float:
        inputs = build_inputs(config)
        if inputs.prepare:
            inputs = inputs.prepare(splits['test'], [])

        def encode(batch: Any, name: str, prepared: bool = False) -> Any:
            batch = batch if prepared else inputs.eval.device(None, batch)  # pyright: ignore
            return batch['image'].reshape(len(batch['image']), -1)

        e = Subject(encode, inputs, splits, parallel.make_mesh(), batch_size=16)
        return dict(uniformity.make(seed=seed)(e))['alignment']

    assert alignment(config, 1) == alignment(config, 1) != alignment(config, 2)
    assert alignment(config, 1) > 0.01
    with config.unlocked():
        config.inputs.augment = {}
        config.inputs.crop = {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': 0.0}
    assert alignment(config, 1) == pytest.approx(0, abs=1e-6)


def test_wrong_options_are_refused():
    for make, key, value in [
        (clustering.make, 'clusters', -1),
        (clustering.make, 'restarts', 0),
        (clustering.make, 'iterations', 0),
        (uniformity.make, 't', 0.0),
        (uniformity.make, 'images', -1),
    ]:
        with pytest.raises(UserError, match=key):
            make(**{key: value})
    x, label = blobs(0, 60)
    with pytest.raises(UserError, match=r'clusters: got 61, but 60'):
        dict(clustering.make(clusters=61)(encoder({'train': (x, label), 'test': (x, label)})))
