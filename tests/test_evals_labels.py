"""Probes with few labels and of any output, and fine-tuning, on one device and on eight."""

import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler
from subjects import subject
from test_evals import blobs, encoder, sklearn_knn, sklearn_linear

from contrastive_jax import evals, models, parallel
from contrastive_jax.config import UserError
from contrastive_jax.evals import finetune, knn, linear
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
    assert list(found) == ['map_top1', 'patches_top1']
    assert found['map_top1'] == found['patches_top1'] > 0.6  # chance is a third
    # Raw pixels have no outputs.
    assert probe(1, 'map', tower=False) == {}
    with pytest.raises(UserError, match=r"outputs: unknown .*'maps'.*Did you mean 'map'"):
        probe(1, 'maps')


def test_what_is_forgotten_is_computed_again():
    e = with_maps(1, 4, 8)
    first = e.features('test', 'map')
    assert e.features('test', 'map') is first
    e.forget('map')
    again = e.features('test', 'map')
    assert again is not first
    np.testing.assert_array_equal(again.x_ND, first.x_ND)


def test_outputs_by_patterns_are_in_order():
    e = with_maps(1, 2, 3)
    e._outputs = lambda: ['block1', 'block10', 'block2', 'cls', 'features']
    assert e.named(('block*', 'cls', 'stage*', 'block1'), '') == [
        *('block1', 'block2', 'block10', 'cls')
    ]


# --- fine-tuning ---------------------------------------------------------------------------------


class Small(nn.Module):
    """A patch embedding and a block with BatchNorm: [B, H, W, 3] -> [B, 16]."""

    @nn.compact
    def __call__(self, x, train):
        B, H, W, _ = x.shape
        x = x.reshape(B, H // 4, 4, W // 4, 4, 3).swapaxes(2, 3).reshape(B, -1, 48)
        x = nn.Dense(16, name='stem')(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='stem_norm')(x)
        x = nn.relu(x).mean(1)
        return nn.Dense(16, name='block0')(x), {}


def textures(rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one of four textures, faint in noise."""
    label = rng.integers(0, 4, n)
    places = np.arange(8)
    grid = np.stack(
        [
            np.broadcast_to(places[:, None] % 2, (8, 8)),
            np.broadcast_to(places[None, :] % 2, (8, 8)),
            (places[:, None] + places[None, :]) % 2,
            (places[:, None] // 2 + places[None, :] // 2) % 2,
        ]
    )
    x = 128 + 30 * (2 * grid[label] - 1)[..., None] + rng.normal(size=(n, 8, 8, 3)) * 45
    return x.clip(0, 255).astype(np.uint8), label.astype(np.int32)


MEAN, STD = (0.5,) * 3, (0.25,) * 3


@pytest.fixture(scope='module')
def tower():
    """Small, trained on plenty of labelled textures: there is something to transfer."""
    import optax

    module, rng = Small(), np.random.default_rng(5)
    x, label = textures(rng, 2000)
    x = (x / 255 - 0.5).astype(np.float32) / 0.25
    params, stats = models.init(module, jax.random.key(0), x[:1])
    head = jax.random.normal(jax.random.key(1), (16, 4)) / 4
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, stats, opt, x, label):
        def loss(params):
            (z, _), new = models.apply(module, params, stats, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(z @ head, label).mean(), new

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), stats, opt

    opt = tx.init(params)
    for i in range(60):
        some = slice(i * 100 % 2000, i * 100 % 2000 + 100)
        params, stats, opt = step(params, stats, opt, x[some], label[some])
    return evals.Tower(module, params, stats)


def pictures(tower, devices: int = 1, seen: list | None = None) -> evals.Encoder:
    """80 labelled pictures, 10 of validation, 203 of test, as an encoder's data."""
    rng = np.random.default_rng(0)
    data = {
        name: textures(rng, n) for name, n in (('train', 81), ('validation', 13), ('test', 203))
    }
    data['train'][1][::9] = -1

    def images(split, rows):
        if seen is not None:
            seen.append((split, tuple(rows)))
        return data[split][0][rows]

    def batches(split):
        x, label = data[split]
        for start in range(0, len(x), 24):
            some, short = slice(start, start + 24), max(0, start + 24 - len(x))
            yield {
                'image': np.pad(x[some], ((0, short), (0, 0), (0, 0), (0, 0))),
                'label': np.pad(label[some], (0, short)),
                'mask': np.pad(np.ones(24 - short, np.float32), (0, short)),
            }

    return evals.Encoder(
        lambda batch, name: batch['image'][:, 0, 0].astype(jnp.float32),
        tuple(data),
        ['a', 'b', 'c', 'd'],
        batches,
        parallel.make_mesh(jax.devices()[:devices]),
        images=images,
        tower=tower,
        views=evals.Views(MEAN, STD, {'scale': (0.8, 1.0), 'flip': 0.5}, lambda split, rows: 1 / 0),
    )


OPTIONS: Any = {
    'per_class': (5,),
    'draws': 2,
    'min_steps': 20,
    'epochs': 1,
    'batch_size': 16,
    'learning_rates': (3e-3,),
    'layer_decay': 1.0,
}


def test_fine_tuning_beats_training_from_scratch_and_devices_do_not_matter(tower):
    before = jax.tree.map(np.array, tower)
    results = [dict(finetune.make(**OPTIONS)(pictures(tower, n))) for n in (1, 8)]
    one = results[0]
    names = ('top1_5_per_class', 'top1_5_per_class_std')
    assert list(one) == [*names, *(f'scratch_{n}' for n in names)]
    assert one['top1_5_per_class'] > 0.9
    assert one['top1_5_per_class'] > one['scratch_top1_5_per_class'] + 0.2
    # Sums are added up in another order: a picture or two at the boundary may change sides.
    assert one == pytest.approx(results[1], abs=0.01)
    # The encoder that is evaluated stays what it is.
    jax.tree.map(np.testing.assert_array_equal, before[1:], tower[1:])


def test_a_batch_that_devices_do_not_divide(tower):
    """Rows that fill it up count for nothing; with mixup."""
    options = {**OPTIONS, 'scratch': False, 'draws': 1, 'batch_size': 12}
    found = dict(finetune.make(**options, mixup=0.2)(pictures(tower, 8)))
    assert found['top1_5_per_class'] > 0.9


def test_the_learning_rate_is_chosen_without_test_labels(tower):
    """A rate that destroys and one that does nothing are not taken."""
    options = {**OPTIONS, 'scratch': False, 'draws': 1, 'learning_rates': (1e-9, 3e-3, 1e4)}
    found = dict(finetune.make(**options)(pictures(tower)))
    assert found['top1_5_per_class'] > 0.9


def test_fine_tuning_reads_what_was_drawn_and_scratch_is_trained_once(tower):
    seen: list = []
    evaluate = finetune.make(**{**OPTIONS, 'min_steps': 2, 'draws': 1, 'fractions': (0.1,)})
    e = pictures(tower, seen=seen)
    first = dict(evaluate(e))
    label = e.labelled().label_N
    first_validation = len(e.features('train').label_N)
    for labels in (5, 0.1):
        (rows,) = few_labels.draws(label, labels, 1, 0)
        for split, some in (
            ('train', rows[rows < first_validation]),
            ('validation', rows[rows >= first_validation] - first_validation),
        ):
            assert (split, tuple(some)) in seen or not len(some)
    test = [rows for split, rows in seen if split == 'test']
    assert [len(rows) for rows in test] == [1, 203]  # and then kept
    again = dict(evaluate(pictures(tower)))
    assert again == first
    assert {k for k in first if k.startswith('scratch_')} == {
        f'scratch_top1_{n}{s}' for n in ('5_per_class', '10_percent') for s in ('', '_std')
    }
    untrained = pictures(tower)
    untrained.random = True  # nothing to fine-tune: that is training from scratch
    assert dict(evaluate(untrained)) == {k: v for k, v in first.items() if k.startswith('scratch_')}


def test_test_images_that_do_not_fit_are_read_again(tower):
    options = {**OPTIONS, 'min_steps': 2, 'scratch': False}
    small = 192 * 150 / 2**30
    seen: list = []
    found = dict(finetune.make(**options, memory=small)(pictures(tower, seen=seen)))
    assert len([1 for split, rows in seen if split == 'test' and len(rows) == 203]) == 2
    assert found == dict(finetune.make(**options)(pictures(tower)))
    with pytest.raises(UserError, match='20 pictures need'):
        dict(finetune.make(**options, memory=192 * 10 / 2**30)(pictures(tower)))


def test_raw_pixels_and_unlabelled_data_are_not_fine_tuned(tower, caplog):
    assert list(finetune.make()(pictures(None))) == []
    e = pictures(tower)
    e.classes = []
    with caplog.at_level(logging.INFO, 'absl'):
        assert list(finetune.make()(e)) == []
    assert 'fine-tuning is not evaluated' in caplog.text


def test_wrong_options_are_refused():
    for make, key, value in [
        (knn.make, 'fractions', (0.0,)),
        (linear.make, 'fractions', (1.5,)),
        (linear.make, 'outputs', ()),
        (finetune.make, 'draws', 0),
        (finetune.make, 'epochs', 0),
        (finetune.make, 'learning_rates', ()),
        (finetune.make, 'learning_rates', (1e-3, 0)),
        (finetune.make, 'layer_decay', 0),
        (finetune.make, 'batch_size', 0),
        (finetune.make, 'memory', 0),
    ]:
        with pytest.raises(UserError, match=key):
            make(**{key: value})
