"""Tiles: where they are cut, what is taken from them, and that this hides the shortcuts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from contrastive_jax import inference, optim, state
from contrastive_jax.config import UserError, build
from contrastive_jax.inputs import patches
from contrastive_jax.methods import jigsaw, relative_patch

PLAIN = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'crop': {'scale': (1.0, 1.0), 'flip': 0.0}}
CUT = {'size': 24, 'region': 24, 'tile': 6, 'jitter': 1}
STEPS, B = 60, 32


def make(**options):
    return patches.make(**{**PLAIN, **CUT, **options})


def image(seed=0, side=24):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def test_tiles_are_where_the_grid_says():
    """Cells of 8, tiles of 6 one pixel within them; of 26 pixels one more is left on each side."""
    x = image()
    row = make().task.host({'image': x}, None)['views']
    for i, (top, left) in enumerate([(8 * a + 1, 8 * b + 1) for a in range(3) for b in range(3)]):
        np.testing.assert_array_equal(row[i], x[top : top + 6, left : left + 6])
    x = image(side=26)
    row = make(region=26).task.host({'image': x}, None)['views']
    np.testing.assert_array_equal(row[4], x[10:16, 10:16])


def test_jitter_moves_each_tile_by_itself_and_within_its_cell():
    flat = make(crop={**PLAIN['crop'], 'interpolation': 'bilinear', 'ratio': (1.0, 1.0)})
    x, rng = image(), np.random.default_rng(0)
    moves = []
    for _ in range(60):
        row = flat.train.host({'image': x}, rng)['views']
        found = [
            [
                (down, right)
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                for top, left in [(8 * (i // 3) + 1 + down, 8 * (i % 3) + 1 + right)]
                if np.array_equal(row[i], x[top : top + 6, left : left + 6])
            ]
            for i in range(9)
        ]
        assert all(len(f) == 1 for f in found)
        moves.append([f[0] for f in found])
    moves = np.asarray(moves)
    assert {tuple(m) for m in moves.reshape(-1, 2)} == {
        (a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)
    }
    correlation = np.corrcoef(moves.reshape(60, 18).T)
    assert np.abs(correlation - np.eye(18)).max() < 0.6


def test_projection_takes_green_against_magenta_out():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 6, 6, 3)), jnp.float32)
    a = np.array([-1.0, 2.0, -1.0])
    want = np.float64(x) @ (np.eye(3) - np.outer(a, a) / (a @ a))
    got = patches.project(None, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(np.float64(got) @ a, 0, atol=1e-5)


def test_dropping_keeps_one_channel_of_each_tile_and_all_equally_often():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 9, 6, 6, 3)) + 3, jnp.float32)
    got = np.asarray(patches.drop(jax.random.key(0), x))
    deviation = got.std((2, 3))
    kept = deviation.argmax(2)
    centred = np.asarray(x - x.mean((2, 3), keepdims=True))
    index = kept[:, :, None, None, None]
    np.testing.assert_allclose(
        np.take_along_axis(got, index, 4), np.take_along_axis(centred, index, 4), atol=1e-5
    )
    others = np.sort(deviation, axis=2)[:, :, :2] / deviation.max(2, keepdims=True)
    assert 0.008 < others.mean() < 0.012
    assert np.abs(np.bincount(kept.ravel()) / kept.size - 1 / 3).max() < 0.05


def test_tiles_are_standardised_one_by_one_and_flat_ones_are_zeros():
    x = np.random.default_rng(0).normal(size=(2, 9, 6, 6, 3)).astype(np.float32)
    x = x * np.linspace(0.1, 9, 9, dtype=np.float32).reshape(1, 9, 1, 1, 1) + 5
    x[0, 0] = 7
    got = np.asarray(patches.standardised(jnp.asarray(x)))
    np.testing.assert_array_equal(got[0, 0], 0)
    np.testing.assert_allclose(got.mean((2, 3, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(got.std((2, 3, 4)).ravel()[1:], 1, rtol=1e-4)


def test_evaluators_see_whole_images_in_the_same_way_and_the_same_each_time():
    inputs = make(colour='project')
    rows = np.stack([inputs.eval.host({'image': image(i)}, None)['image'] for i in range(2)])
    seen = inputs.eval.device(None, {'image': jnp.asarray(rows)})['image']
    want = patches.standardised(patches.project(None, (jnp.asarray(rows) / 255 - 0.5) / 0.5))
    np.testing.assert_allclose(seen, want, atol=1e-4)
    tuned = inputs.tune.device(jax.random.key(0), {'views': jnp.asarray(rows)[:, None]})['views']
    np.testing.assert_allclose(tuned[:, 0], want, atol=1e-4)
    tiles = {'views': jnp.asarray(inputs.task.host({'image': image()}, None)['views'])[None]}
    one, other = (make().task.device(None, tiles)['views'] for _ in range(2))
    np.testing.assert_array_equal(one, other)


# Shortcuts: images of which nothing but one of them tells where a tile lies.


def colours_that_drift(seed):
    """Noise, in which red and blue are displaced outwards from the middle, as lenses do."""
    rng = np.random.default_rng(seed)
    x = np.kron(rng.normal(size=(B, 16, 16, 1)), np.ones((1, 2, 2, 1)))
    places = np.arange(24)
    out = [(4 + places + s * np.sign(places - 12) * (abs(places - 12) // 3)) for s in (1, 0, -1)]
    return np.concatenate([x[:, o.clip(0, 31)][:, :, o.clip(0, 31)] for o in out], axis=3)


def brightness_that_falls(seed):
    """Noise about a mean that falls from the top left to the bottom right."""
    noise = np.random.default_rng(seed).normal(size=(B, 24, 24, 1)) * 0.3
    slope = np.linspace(1, -1, 24).reshape(1, 24, 1, 1)
    return np.repeat(noise + slope + 0.7 * slope.transpose(0, 2, 1, 3), 3, axis=3)


def edges_that_run_on(seed):
    """Noise, with a stroke across each border of two cells, bright or dark on both sides of it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, 24, 24, 1)) * 0.1
    for border in (8, 16):
        for at in (slice(0, 8), slice(8, 16), slice(16, 24)):
            down, across = rng.choice([-1.5, 1.5], (2, B, 1, 1, 1))
            x[:, at, border - 1 : border + 1] += across
            x[:, border - 1 : border + 1, at] += down
    return np.repeat(x, 3, axis=3)


@functools.cache
def accuracy(images, puzzle=False, **defences):
    """(mean, standard error over images) on held-out ones, after STEPS of training."""
    inputs = make(**defences)
    model = build('models', {'name': 'resnet', 'stem': 'patch', 'widths': (16,), 'blocks': (1,),
                             'zero_init_last': False}, 'test')  # fmt: skip
    method = relative_patch.make(model, hidden=64)
    if puzzle:
        method = jigsaw.make(model, permutations=8, orders=8, width=16, hidden=64)
    tx, _ = optim.make(name='adamw', learning_rate=0.01, total_steps=STEPS, batch_size=256)
    step = jax.jit(state.make_step(method, tx, inputs.train.device, 0, STEPS))

    def batch(seed, transform=inputs.train):
        x = (images(seed) * 40 + 128).clip(0, 255).astype(np.uint8)
        rng = np.random.default_rng(seed)
        return {'views': np.stack([transform.host({'image': i}, rng)['views'] for i in x])}

    start = {'views': jnp.zeros((1, *inputs.train.shapes['views'].shape))}
    s = jax.jit(state.make_init(method, tx, 0, 100))(start)
    for i in range(STEPS):
        s, _ = step(s, batch(i))
    score = jax.jit(
        lambda rows: method.task.score(
            s.params, s.extra, inputs.task.device(None, rows), jax.random.key(0)
        )['accuracy']
    )
    found = np.concatenate([score(batch(10_000 + i, inputs.task)) for i in range(10)])
    return found.mean(), found.std() / np.sqrt(len(found))


@pytest.mark.parametrize('puzzle', [False, True])
def test_brightness_is_hidden(puzzle):
    """Of eight directions and of eight permutations."""
    mean, error = accuracy(brightness_that_falls, puzzle)
    assert abs(mean - 1 / 8) < 3 * error
    assert error < 0.01
    mean, error = accuracy(brightness_that_falls, puzzle, colour='keep', standardise=False)
    assert mean > 1 / 8 + 10 * error


def test_displaced_colours_are_hidden():
    mean, error = accuracy(colours_that_drift)
    assert abs(mean - 1 / 8) < 3 * error
    mean, error = accuracy(colours_that_drift, colour='keep')
    assert mean > 1 / 8 + 10 * error


def test_edges_that_run_on_are_hidden_by_the_gap():
    mean, error = accuracy(edges_that_run_on, colour='keep')
    assert abs(mean - 1 / 8) < 3 * error
    mean, error = accuracy(edges_that_run_on, colour='keep', tile=8, jitter=0)
    assert mean > 1 / 8 + 10 * error


@pytest.mark.parametrize(('key', 'value'), [('standardise', True), ('colour', 'project')])
def test_files_of_weights_that_cannot_say_it_are_refused(key, value, monkeypatch):
    inputs = {'name': 'patches', **PLAIN, **CUT, 'standardise': False, 'colour': 'keep', key: value}
    monkeypatch.setattr(inference.runs, 'config_of', lambda path: ConfigDict({'inputs': inputs}))
    with pytest.raises(UserError, match=rf'a_run: was trained with config\.inputs\.{key}='):
        inference.weights_of('a_run')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'tile': 9}, r'inputs\.tile: got 9; a cell of 24 // 3 has 8'),
        ({'jitter': 2}, r'inputs\.jitter: got 2; expected a whole number from 0 to 1'),
        ({'grid': 1}, r'inputs\.grid: got 1'),
        ({'colour': 'grey'}, "unknown colour 'grey'"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
