"""Rotations: exact turns, a task that cannot be solved without an up, and held-out answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from test_configs import CONFIGS, load

from contrastive_jax import experiment, inference, optim, parallel, state
from contrastive_jax.config import UserError, build
from contrastive_jax.evaluation import Asked
from contrastive_jax.methods import rotation

B, SIDE, STEPS = 32, 8, 80
SPEC = {'name': 'resnet', 'stem': 'patch4', 'widths': (8, 16), 'blocks': (1, 1)}


def noise(seed, count=B):
    """Textures: no direction is another than the others."""
    return np.random.default_rng(seed).normal(size=(count, SIDE, SIDE, 3)).astype(np.float32)


def with_an_up(seed, count=B):
    """The same, brighter at the top."""
    ramp = np.linspace(1, -1, SIDE, dtype=np.float32).reshape(1, SIDE, 1, 1)
    return noise(seed, count) + ramp


@functools.cache
def method():
    return rotation.make(build('models', SPEC, 'test'))


@functools.cache
def trained(images):
    """A state after STEPS steps, each of other images."""
    tx, _ = optim.make(name='adamw', learning_rate=0.01, total_steps=STEPS, batch_size=256)
    step = jax.jit(state.make_step(method(), tx, lambda key, batch: batch, 0, STEPS))
    s = jax.jit(state.make_init(method(), tx, 0, 100))({'views': images(0, 1)[:, None]})
    for i in range(STEPS):
        s, metrics = step(s, {'views': images(i)[:, None]})
    return s, metrics


def answers(s, images):
    found = jax.jit(method().task.score)(s.params, s.extra, {'image': images}, jax.random.key(0))
    return found['accuracy']


def test_turns_are_numpys_to_the_bit():
    images = noise(0, 3)
    got = jax.jit(rotation.turned)(images)
    for k in range(4):
        for i in range(3):
            np.testing.assert_array_equal(got[i, k], np.rot90(images[i], k))
    # The authors' 90 degrees: transposed, then upside down.
    np.testing.assert_array_equal(got[0, 1], np.flipud(images[0].transpose(1, 0, 2)))


def test_labels_are_turns_and_all_four_count():
    """The loss is the mean of −log p(turn) over the four turns of every image, in float64."""
    s, _ = trained(with_an_up)
    images = with_an_up(5)
    value, aux = jax.jit(method().loss)(
        s.params, s.extra, {'views': images[:, None]}, jax.random.key(0), jnp.float32(0)
    )
    # One call on all of them: BatchNorm sees the four turns together.
    rows = np.concatenate([np.stack([np.rot90(x, k) for k in range(4)]) for x in images])
    (features, _), variables = build('models', SPEC, 'test').apply(
        {'params': s.params['encoder'], 'batch_stats': s.extra['stats']['encoder']},
        rows, train=True, mutable=['batch_stats'],
    )  # fmt: skip
    p = jax.tree.map(np.float64, s.params['head']['linear'])
    logits = np.float64(features) @ p['kernel'] + p['bias']
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    turn = np.tile(np.arange(4), B)
    np.testing.assert_allclose(value, -logits[np.arange(4 * B), turn].mean(), rtol=1e-4)
    assert np.isclose(aux.metrics['accuracy'], (logits.argmax(1) == turn).mean())
    for a, b in zip(
        *map(jax.tree.leaves, (aux.extra['stats']['encoder'], variables['batch_stats'])),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_images_without_an_up_leave_it_at_chance():
    """Nothing of the turning itself can be seen; where there is an up, it is found."""
    right = answers(trained(noise)[0], noise(10_000, 1000))
    error = np.std(right) / np.sqrt(len(right))
    assert 0 < error < 0.02
    assert abs(right.mean() - 0.25) < 3 * error
    assert answers(trained(with_an_up)[0], with_an_up(10_000, 1000)).mean() > 0.9


def test_images_that_are_the_same_after_every_turn_are_answered_once():
    x = noise(3)
    turns = [np.rot90(x, k, axes=(1, 2)) for k in range(4)]
    same = (turns[0] + turns[2]) + (turns[1] + turns[3])
    np.testing.assert_array_equal(answers(trained(noise)[0], same), np.full(B, 0.25))


def test_other_rows_than_one_square_image_are_refused():
    with pytest.raises(UserError, match=r'rows of \[8, 6, 3\]; rotation needs square images'):
        method().init(jax.random.key(0), {'views': jnp.zeros((2, 1, 8, 6, 3))}, 9)
    with pytest.raises(UserError, match=r'rows of \[800\]; rotation needs square images'):
        method().init(jax.random.key(0), {'views': jnp.zeros((2, 1, 800))}, 9)
    s, _ = trained(noise)
    views = {'views': jnp.zeros((2, 2, 8, 8, 3))}
    with pytest.raises(UserError, match='views: got 2; rotation needs 1'):
        method().loss(s.params, s.extra, views, jax.random.key(0), jnp.float32(0))


class TestEvaluator:
    def evaluate(self, devices=1, batch=48, **options):
        """Of 50 test records whose results are known, two of them bad."""
        x = np.arange(50, dtype=np.float32).reshape(50, 1) + 1
        split = {name: (x, np.zeros(50, np.int32)) for name in ('train', 'test')}
        score = jax.jit(
            lambda batch: {'psnr': batch['image'][:, 0], 'half': batch['image'][:, 0] * 0 + 0.5}
        )
        asked = Asked(score, {'half': '%', 'psnr': 'dB'})
        subject = subjects.subject(
            split, None, devices=devices, batch=batch, bad=(0, 49), task=asked
        )
        return dict(build('evals', {'name': 'pretext', **options}, 'test')(subject))

    @pytest.mark.parametrize(('devices', 'batch'), [(1, 48), (8, 16)])
    def test_means_are_of_records_that_can_be_used(self, devices, batch):
        found = self.evaluate(devices, batch)
        assert found == {'half': 0.5, 'psnr': 25.5}
        assert [(m.title, m.unit) for m in found.values()] == [
            ('pretext, half', '%'),
            ('pretext, psnr', 'dB'),
        ]

    def test_another_split_is_named(self):
        assert self.evaluate(split='train')['half'].title == 'pretext, train split, half'
        assert self.evaluate(split='validation') == {}
        with pytest.raises(UserError, match=r"unknown split 'tset'\. Did you mean 'test'"):
            self.evaluate(split='tset')

    def test_of_a_run_and_of_what_has_no_task(self):
        """A new classifier answers 0 to all: a quarter is right, to the bit at any evaluation."""
        config = load(next(p for p in CONFIGS if p.stem == 'rotation')).get_config()
        mesh = parallel.make_mesh(jax.devices()[:1])
        with config.unlocked():
            config.model, config.evals = SPEC, {'pretext': {}}
        with jax.set_mesh(mesh):
            e = experiment.open(config, None, mesh)
            (evaluate,) = e.evaluators.values()
            found = dict(evaluate(inference.subject(e, e.init())))
            baseline = inference.baseline(e.inputs, e.splits, mesh, 64, e.bad)
            assert not dict(evaluate(baseline))
        assert found == {'accuracy': 0.25}
        assert found['accuracy'].title == 'pretext, accuracy'
