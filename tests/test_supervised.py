"""The method `supervised` against its formulas in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from subjects import subject

from contrastive_jax.config import UserError, build
from contrastive_jax.evals import classifier
from contrastive_jax.evaluation.subject import Weights
from contrastive_jax.methods import supervised

B, V, C, SIDE = 12, 2, 5, 8
SPEC = {'name': 'vit', 'width': 16, 'depth': 1, 'heads': 2, 'patch': 4}


def batch(seed=0, **labels):
    views = np.random.default_rng(seed).normal(size=(B, V, SIDE, SIDE, 3)).astype(np.float32)
    label = np.random.default_rng(seed).integers(0, C, B).astype(np.int32)
    return {'views': views, 'label': label, **labels}


@functools.cache
def method(**options):
    return supervised.make(build('models', SPEC, 'test'), classes=C, **options)


@functools.cache
def start():
    """A state whose classifier is not at 0."""
    params, extra = method().init(jax.random.key(0), batch(), 0)
    kernel = jax.random.normal(jax.random.key(1), (16, C))
    return {**params, 'head': {'linear': {'kernel': kernel, 'bias': jnp.arange(C) / C}}}, extra


def loss(given, key=0, **options):
    """(value, metrics) of a batch."""
    value, aux = jax.jit(method(**options).loss)(
        *start(), given, jax.random.key(key), jnp.float32(0)
    )
    return float(value), aux.metrics


def log_probabilities(given):
    """[B, V, C] of every view by `encode`, in float64."""
    encode = jax.jit(method().encode)
    views = [encode(*start(), {'image': given['views'][:, v]})['logits'] for v in range(V)]
    return log_softmax(np.stack(views, 1).astype(np.float64), axis=-1)


def test_a_new_classifier_takes_every_class_for_as_likely():
    params, extra = method().init(jax.random.key(0), batch(), 0)
    logits = method().encode(params, extra, {'image': batch()['views'][:, 0]})['logits']
    np.testing.assert_array_equal(logits, np.zeros((B, C)))


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_it_is_the_cross_entropy_of_all_views_of_labelled_rows(smoothing):
    given = batch()
    given['label'][[1, 7]] = -1
    log_p, label = log_probabilities(given), given['label']
    target = (1 - smoothing) * np.eye(C)[label] + smoothing / C
    value, metrics = loss(given, label_smoothing=smoothing)
    rows = label >= 0
    assert value == pytest.approx(-(log_p * target[:, None]).sum(2)[rows].mean(), rel=1e-5)
    accuracy = (log_p.argmax(2) == label[:, None])[rows].mean()
    assert float(metrics['accuracy']) == pytest.approx(accuracy, rel=1e-6)
    # What rows without a label show does not matter.
    given['views'][1] += 1
    assert loss(given, label_smoothing=smoothing)[0] == pytest.approx(value, rel=1e-6)


def test_another_label_of_the_data():
    given = batch()
    other = {**given, 'label': np.zeros_like(given['label']), 'speaker': given['label']}
    assert loss(other, label='speaker')[0] == loss(given)[0]


def test_without_labels_the_loss_is_0_and_a_label_too_many_stops_the_run():
    nothing = batch(label=np.full(B, -1, np.int32))
    assert loss(nothing)[0] == 0
    gradient = jax.jit(jax.grad(method().loss, has_aux=True))
    grads, _ = gradient(*start(), nothing, jax.random.key(0), jnp.float32(0))
    assert all((x == 0).all() for x in jax.tree.leaves(grads))
    assert np.isnan(loss(batch(label=np.full(B, C, np.int32)))[0])


def test_mixup_mixes_images_and_labels_by_one_share():
    """Of rows of one image each, λ is what the mixed image says: the loss must agree with it."""
    # Classes 0 and 1 have one image each, so that every mixed row is λ of one and 1 − λ of the
    # other; the loss of all is between those of both shares.
    given = batch()
    given['label'] = (np.arange(B) % 2).astype(np.int32)
    given['views'] = np.stack([given['views'][0], given['views'][1]])[given['label']]
    values = {loss(given, key=k, mixup=0.4)[0] for k in range(4)}
    assert len(values) == 4

    def mixed(share):
        """Mean losses of rows mixed with their own class, and with the other one."""
        x = share * given['views'][0] + (1 - share) * given['views'][1]
        log_p = log_probabilities({'views': np.stack([x] * B)})[0]
        return -(share * log_p[:, 0] + (1 - share) * log_p[:, 1]).mean()

    for key in range(4):
        share_key, order_key = jax.random.split(jax.random.key(key), 3)[1:]
        share = float(jax.random.beta(share_key, 0.4, 0.4))
        partner = np.asarray(jax.random.permutation(order_key, B))
        weight = share * (given['label'] == 0) + (1 - share) * (given['label'][partner] == 0)
        expected = np.mean([mixed(w) for w in weight])
        assert loss(given, key=key, mixup=0.4)[0] == pytest.approx(expected, rel=1e-4)


def pasted(key, height, width, alpha):
    """Where timm pastes, from its formulas in a loop: bool [H, W], and λ by its area."""
    draw, place = (jax.random.split(key, 4)[i] for i in (1, 2))
    side = np.sqrt(1 - float(jax.random.beta(draw, alpha, alpha)))
    y, x = np.asarray(jax.random.randint(place, (2,), 0, jnp.asarray((height, width))))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    box = np.zeros((height, width), bool)
    for i in range(max(y - half_y, 0), min(y + half_y, height)):
        for j in range(max(x - half_x, 0), min(x + half_x, width)):
            box[i, j] = True
    return box, 1 - box.mean()


def test_cutmix_pastes_rectangles_and_mixes_labels_by_their_area():
    areas = []
    for seed in range(40):
        key = jax.random.key(seed)
        box, own = pasted(key, 6, 9, 1.0)
        np.testing.assert_array_equal(supervised.share(key, (6, 9), 0.0, 1.0)[0, 0, :, :, 0], ~box)
        areas.append(own)
    assert min(areas) < 0.5
    assert max(areas) > 0.9
    given = batch()
    share_key, order_key = jax.random.split(jax.random.key(3), 3)[1:]
    box, own = pasted(share_key, SIDE, SIDE, 1.0)
    assert 0.1 < own < 0.9
    partner = np.asarray(jax.random.permutation(order_key, B))
    views = np.where(box[:, :, None], given['views'][partner], given['views'])
    target = own * np.eye(C)[given['label']] + (1 - own) * np.eye(C)[given['label'][partner]]
    log_p = log_probabilities({'views': views})
    expected = -(log_p * target[:, None]).sum(2).mean()
    assert loss(given, key=3, cutmix=1.0)[0] == pytest.approx(expected, rel=1e-5)


def test_a_coin_chooses_between_mixup_and_cutmix():
    seen = [np.unique(supervised.share(jax.random.key(k), (8, 8), 0.8, 1.0)) for k in range(60)]
    pastes = sum(set(values) <= {0.0, 1.0} for values in seen)
    assert 18 < pastes < 42  # 30 ± 3 standard deviations
    assert all(len(v) == 1 for v in seen if not set(v) <= {0.0, 1.0})


def test_a_probe_leaves_the_encoder_as_it_is():
    given, probe = batch(), method(locked=True, batch_norm=True, head_std=0.01)
    params, extra = probe.init(jax.random.key(0), given, 0)
    assert {name: set(module) for name, module in params.items()} == {'head': {'linear'}}
    kernel = np.asarray(params['head']['linear']['kernel'])
    assert 0.007 < kernel.std() < 0.013
    value, aux = jax.jit(probe.loss)(params, extra, given, jax.random.key(0), jnp.float32(0))
    # BatchNorm without scale and bias, of all views of the batch, in float64.
    whole = {'encoder': extra['frozen']['encoder'], **params}
    views = given['views'].reshape(-1, SIDE, SIDE, 3)
    encode = jax.jit(probe.encode)
    x = np.asarray(encode(params, extra, {'image': views})['features'], np.float64)
    normal = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    log_p = log_softmax(normal @ kernel, axis=1)
    expected = -log_p[np.arange(B * V), np.repeat(given['label'], V)].mean()
    assert float(value) == pytest.approx(expected, rel=1e-5)
    for before, after in zip(*map(jax.tree.leaves, (extra, aux.extra)), strict=False):
        assert before.shape == after.shape
    frozen = jax.tree.map(np.array_equal, extra['frozen'], aux.extra['frozen'])
    assert all(jax.tree.leaves(frozen))
    moved = aux.extra['stats']['head']['norm']
    np.testing.assert_allclose(moved['mean'], 0.1 * x.mean(0), atol=1e-5)
    assert probe.encoders(params, extra)['image'][0] is whole['encoder']


def scores(logits, label, names='abcdefg'):
    """The evaluator `classifier` on given logits [n, C]."""
    rows = {'train': (logits[:3], label[:3]), 'test': (logits, label)}
    outputs = {'features': 0, 'logits': 0}
    seen = subject(
        rows,
        lambda batch, name, prepared=False: batch['image'],
        batch=4,
        classes=list(names),
        weights=Weights(nn.Dense(1), {}, {}),
        outputs=lambda: list(outputs),
    )
    return dict(classifier.make()(seen))


def test_the_trained_classifier_is_measured_on_the_test_split():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(37, 7)).astype(np.float32)
    label = rng.integers(-1, 7, 37)
    rank = (-logits).argsort(1)[label >= 0]
    right = rank == label[label >= 0][:, None]
    found = scores(logits, label)
    assert found == {'top1': right[:, 0].mean(), 'top5': right[:, :5].any(1).mean()}
    assert found['top1'].title == 'classifier'
    # Who says nothing, or what is not a number, is right about nothing.
    assert scores(np.zeros_like(logits), label) == {'top1': 0, 'top5': 0}
    assert scores(np.full_like(logits, np.nan), label) == {'top1': 0, 'top5': 0}
    assert set(scores(logits[:, :4], label % 4, 'abcd')) == {'top1'}


def test_wrong_options_are_refused():
    for options, said in (
        ({'classes': 0}, 'classes: got 0'),
        ({'classes': 3, 'mixup': -1.0}, 'mixup: got -1'),
        ({'classes': 3, 'cutmix': -1.0}, 'cutmix: got -1'),
        ({'classes': 3, 'head_std': -1.0}, 'head_std: got -1'),
        ({'classes': 3, 'label_smoothing': 1.0}, 'label_smoothing: got 1'),
    ):
        with pytest.raises(UserError, match=said):
            supervised.make(build('models', SPEC, 'test'), **options)
