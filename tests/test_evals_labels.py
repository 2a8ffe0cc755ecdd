"""Probes with few labels and of any output, on one device and on eight."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler
from subjects import subject
from test_evals import blobs, encoder, sklearn_knn, sklearn_linear

from contrastive_jax import figures, parallel
from contrastive_jax.config import UserError
from contrastive_jax.evals import knn, linear
from contrastive_jax.evaluation import few_labels, pooled
from contrastive_jax.evaluation.subject import Weights

# --- few labels ----------------------------------------------------------------------------------


def test_a_share_of_the_labels_is_stratified_nested_and_repeatable():
    label = np.repeat([0, 1, 2, 3, -1], [100, 37, 6, 1, 50]).astype(np.int32)
    label = np.random.default_rng(0).permutation(label)
    tenth = few_labels.draws(label, 0.1, 3, seed=4)
    for rows in tenth:
        assert list(np.bincount(label[rows])) == [10, 4, 1, 1]
        assert (np.diff(rows) > 0).all()
    assert len({tuple(rows) for rows in tenth}) == 3
    np.testing.assert_array_equal(tenth, few_labels.draws(label, 0.1, 3, seed=4))
    assert (np.array(tenth) != few_labels.draws(label, 0.1, 3, seed=5)).any()
    for small, large in zip(few_labels.draws(label, 0.03, 3, seed=4), tenth, strict=True):
        assert set(small) < set(large)
    (everything,) = few_labels.draws(label, 1.0, 1, seed=0)
    np.testing.assert_array_equal(everything, np.flatnonzero(label >= 0))


def test_names_of_few_labels():
    found = few_labels.named((1, 10), (0.001, 0.01, 0.07))
    assert list(found) == ['1_per_class', '10_per_class', '0.1_percent', '1_percent', '7_percent']
    assert [type(n) for n in found.values()] == [int, int, float, float, float]


def test_knn_with_a_share_of_the_labels_is_sklearn():
    train, test = blobs(0, 301), blobs(1, 131)
    splits = {'train': train, 'test': test}
    found = dict(knn.make(7, 0.1, per_class=(), fractions=(0.1, 0.5), draws=3)(encoder(splits, 8)))
    wide = [part.astype(np.float64) for part in (train[0], test[0])]
    for share in (0.1, 0.5):
        expected = [
            sklearn_knn((wide[0][r], train[1][r]), (wide[1], test[1]), 7, 0.1)
            for r in few_labels.draws(train[1], share, 3, seed=0)
        ]
        name = f'top1_{100 * share:g}_percent'
        assert found[name] == pytest.approx(np.mean(expected), abs=1e-12)
        assert found[f'{name}_std'] == pytest.approx(np.std(expected), abs=1e-12)


@pytest.mark.parametrize('side_by_side', [True, False])
def test_linear_with_a_share_of_the_labels_is_sklearn(side_by_side, monkeypatch):
    """Also as a large set, sharded over the devices."""
    if not side_by_side:
        monkeypatch.setattr(linear, 'TOGETHER', 0)
    train, test = blobs(0, 301), blobs(1, 401)
    options: Any = {'strengths': (10.0,), 'per_class': (), 'fractions': (0.2,), 'draws': 2}
    scaler = StandardScaler().fit(train[0].astype(np.float64))
    x, test_x = scaler.transform(train[0]), scaler.transform(test[0])
    expected = [
        sklearn_linear(x[r], train[1][r], 10.0).score(test_x, test[1])
        for r in few_labels.draws(train[1], 0.2, 2, seed=0)
    ]
    found = dict(linear.make(**options)(encoder({'train': train, 'test': test}, 8)))
    assert found['top1_20_percent'] == pytest.approx(np.mean(expected), abs=0.0026)
    assert found['top1_20_percent_std'] == pytest.approx(np.std(expected), abs=0.0026)


# --- other outputs -------------------------------------------------------------------------------


def with_maps(devices: int, side: int, channels: int, tower: bool = True) -> Any:
    """An encoder whose 'map' says the class in one corner, and whose features say nothing."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 211).astype(np.int32)
    maps = rng.normal(size=(211, side, side, channels)).astype(np.float32)
    maps[:, side // 2 :, side // 2 :, :] += np.eye(3, channels, dtype=np.float32)[label][
        :, None, None, :
    ]
    parts = {'train': slice(0, 130), 'test': slice(130, None)}
    splits = {name: (maps[at], label[at]) for name, at in parts.items()}

    def encode(batch, name, prepared=False):
        x = batch['image']
        outputs = {'features': x[:, 0, 0], 'map': x, 'patches': x.reshape(len(x), -1, channels)}
        outputs['odd'] = x[:, :1, :2]
        return outputs[name]

    return subject(
        splits,
        encode,
        devices=devices,
        batch=16,
        classes=['a', 'b', 'c'],
        weights=Weights(nn.Dense(1), {}, {}) if tower else None,
        outputs=lambda: ['features', 'map', 'odd', 'patches'],
    )


def adaptive(x: np.ndarray, side: int) -> np.ndarray:
    """Adaptive average pooling in loops, flattened."""
    n, h, w, c = x.shape
    out = np.zeros((n, side, side, c))
    for i in range(side):
        for j in range(side):
            rows = slice(i * h // side, -(-(i + 1) * h // side))
            columns = slice(j * w // side, -(-(j + 1) * w // side))
            out[:, i, j] = x[:, rows, columns].mean((1, 2))
    return out.reshape(n, -1)


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize(
    ('side', 'channels', 'cells'), [(4, 8, 4), (7, 400, 4), (7, 4700, 1), (3, 9217, 1)]
)
def test_maps_and_patches_are_pooled_to_9216_dimensions(devices, side, channels, cells):
    x = np.random.default_rng(0).normal(size=(8, side, side, channels)).astype(np.float32)
    expected = adaptive(x, cells)
    assert expected.shape[1] <= max(9216, channels)
    sharded = jax.device_put(x, parallel.rows(parallel.make_mesh(jax.devices()[:devices])))
    np.testing.assert_allclose(pooled.pooled(sharded, 'map'), expected, atol=1e-5)
    patches = sharded.reshape(8, -1, channels)
    np.testing.assert_allclose(pooled.pooled(patches, 'patches'), expected, atol=1e-5)


def test_rows_stay_and_what_is_no_map_is_refused():
    x = jnp.ones((3, 5))
    assert pooled.pooled(x, 'cls') is x
    with pytest.raises(UserError, match=r"'attention' is \['B', 3, 16\].*expected rows"):
        pooled.pooled(jnp.ones((2, 3, 16)), 'attention')


def test_linear_probes_of_other_outputs():
    def probe(devices: int, *outputs: str, tower: bool = True) -> dict[str, Any]:
        options: Any = {'strengths': (10.0,), 'per_class': ()}
        return dict(linear.make(outputs=outputs, **options)(with_maps(devices, 4, 8, tower)))

    found = probe(8, 'm*', 'patches')
    assert found == probe(1, 'm*', 'patches')
    assert list(found) == ['map_top1', 'patches_top1', 'depth']
    assert found['map_top1'] == found['patches_top1'] > 0.6  # chance is a third
    # Raw pixels have no outputs.
    assert probe(1, 'map', tower=False) == {}
    with pytest.raises(UserError, match=r"outputs: unknown .*'maps'.*Did you mean 'map'"):
        probe(1, 'maps')


def test_the_picture_of_layers_ends_with_the_features(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, 'depth', lambda *given: drawn.append(given) or b'')
    options: Any = {'strengths': (10.0,), 'per_class': (), 'label': 'label'}
    outputs = ('features', 'patches', 'map')
    found = dict(linear.make(outputs=outputs, **options)(with_maps(1, 4, 8)))
    tops = [100 * found[key] for key in ('patches_top1', 'map_top1', 'top1')]
    assert drawn == [({'': tops}, ['patches', 'map', 'features'], 'linear')]
    drawn.clear()
    assert 'depth' not in dict(linear.make(**options)(with_maps(1, 4, 8)))
    assert not drawn


def test_maps_are_pooled_to_fewer_dimensions_when_asked():
    options: Any = {'strengths': (10.0,), 'per_class': (), 'outputs': ('map',)}
    seen = with_maps(1, 4, 8)
    widths = [seen.features('test', 'map', dimensions=n).x_ND.shape[1] for n in (9216, 40, 8, 3)]
    assert widths == [128, 32, 8, 8]
    few = dict(linear.make(dimensions=8, **options)(with_maps(1, 4, 8)))
    means = np.asarray(seen.features('test', 'map').x_ND).reshape(-1, 16, 8).mean(1)
    np.testing.assert_allclose(seen.features('test', 'map', dimensions=8).x_ND, means, atol=1e-6)
    assert few['map_top1'] != dict(linear.make(**options)(with_maps(1, 4, 8)))['map_top1']


def test_what_is_forgotten_is_computed_again():
    e = with_maps(1, 4, 8)
    first = e.features('test', 'map')
    assert e.features('test', 'map').x_ND is first.x_ND
    e.forget('map')
    again = e.features('test', 'map')
    assert again.x_ND is not first.x_ND
    np.testing.assert_array_equal(again.x_ND, first.x_ND)


def test_outputs_by_patterns_are_in_order():
    e = with_maps(1, 2, 3)
    e._outputs = lambda: ['block1', 'block10', 'block2', 'cls', 'features']
    assert e.named(('block*', 'cls', 'stage*', 'block1'), '') == [
        *('block1', 'block2', 'block10', 'cls')
    ]


def test_wrong_options_are_refused():
    for make, key, value in [
        (knn.make, 'fractions', (0.0,)),
        (linear.make, 'fractions', (1.5,)),
        (linear.make, 'outputs', ()),
        (linear.make, 'dimensions', 0),
    ]:
        with pytest.raises(UserError, match=key):
            make(**{key: value})
