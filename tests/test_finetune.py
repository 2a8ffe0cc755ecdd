"""Fine-tuning with few labels: the method `supervised` on one device and on eight."""

import logging
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from contrastive_jax import models, parallel
from contrastive_jax.config import UserError
from contrastive_jax.data import labelled
from contrastive_jax.evals import finetune
from contrastive_jax.evaluation import few_labels
from contrastive_jax.evaluation.subject import Subject, Weights
from contrastive_jax.inputs import images

MEAN, STD = (0.5,) * 3, (0.25,) * 3
INPUTS = images.make(size=8, mean=MEAN, std=STD, crop={'scale': (0.8, 1.0), 'flip': 0.5})
OPTIONS: Any = {
    'per_class': (5,),
    'draws': 2,
    'min_steps': 20,
    'epochs': 1,
    'batch_size': 16,
    'learning_rates': (3e-3,),
    'layer_decay': 1.0,
}


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


@pytest.fixture(scope='module')
def weights():
    """Small, trained on plenty of labelled textures: there is something to transfer."""
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
    return Weights(module, params, stats)


class Textures:
    """A split of textures that says which of its records are read."""

    def __init__(self, split, rng, n, classes, seen):
        self.split, self.classes, self.seen = split, labelled(classes), seen
        self.x, self.label = textures(rng, n)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.seen.append((self.split, index))
        return {'image': self.x[index], **{k: int(self.label[index]) for k in self.classes}}

    def describe(self, index):
        return f'{self.split}[{index}]'


def subject(
    weights, devices: int = 1, seen: list | None = None, classes: str = 'abcd', **more: Any
) -> Subject:
    """81 pictures of train, of which 72 have labels, 13 of validation and 203 of test."""
    rng, seen = np.random.default_rng(0), [] if seen is None else seen
    sizes = {'train': 81, 'validation': 13, 'test': 203}
    splits = {name: Textures(name, rng, n, classes, seen) for name, n in sizes.items()}
    splits['train'].label[::9] = -1

    @jax.jit
    def encode(batch):
        return batch['image'][:, 0, 0].astype(np.float32)

    return Subject(
        lambda batch, name: encode(batch),
        more.pop('inputs', INPUTS),
        splits,
        parallel.make_mesh(jax.devices()[:devices]),
        batch_size=24,
        weights=weights,
        **more,
    )


def test_it_beats_training_from_scratch_and_devices_do_not_matter(weights):
    before = jax.tree.map(np.array, weights[1:])
    results = [dict(finetune.make(**OPTIONS)(subject(weights, n))) for n in (1, 8)]
    one = results[0]
    names = ('top1_5_per_class', 'top1_5_per_class_std')
    assert list(one) == [*names, *(f'scratch_{n}' for n in names)]
    assert one['top1_5_per_class'].title == 'finetune, 5 labels per class'
    assert one['scratch_top1_5_per_class'].title == 'finetune, scratch, 5 labels per class'
    assert one['top1_5_per_class'] > 0.9
    assert one['top1_5_per_class'] > one['scratch_top1_5_per_class'] + 0.2
    # Sums are added up in another order: a picture or two at the boundary may change sides.
    assert one == pytest.approx(results[1], abs=0.01)
    # The encoder that is evaluated stays what it is.
    jax.tree.map(np.testing.assert_array_equal, before, weights[1:])


def test_a_batch_that_devices_do_not_divide(weights):
    """Rows that fill it up count for nothing; with mixup."""
    options = {**OPTIONS, 'scratch': False, 'draws': 1, 'batch_size': 12}
    found = dict(finetune.make(**options, mixup=0.2)(subject(weights, 8)))
    assert found['top1_5_per_class'] > 0.9


def test_the_learning_rate_is_chosen_without_test_labels(weights):
    """A rate that destroys and one that does nothing are not taken."""
    options = {**OPTIONS, 'scratch': False, 'draws': 1, 'learning_rates': (1e-9, 3e-3, 1e4)}
    found = dict(finetune.make(**options)(subject(weights)))
    assert found['top1_5_per_class'] > 0.9


def test_it_reads_what_was_drawn_and_scratch_is_trained_once(weights):
    seen: list = []
    evaluate = finetune.make(**{**OPTIONS, 'min_steps': 2, 'draws': 1, 'fractions': (0.1,)})
    s = subject(weights, seen=seen)
    label_N = s.labelled().label_N
    first = len(s.features('train').label_N)  # of validation
    drawn = np.concatenate([few_labels.draws(label_N, labels, 1, 0)[0] for labels in (5, 0.1)])
    assert (drawn >= first).any()
    s.missing()
    seen.clear()
    found = dict(evaluate(s))
    rows = {r + first * (split == 'validation') for split, r in seen if split != 'test'}
    assert rows == set(drawn)
    assert {r for split, r in seen if split == 'test'} == set(range(203))
    assert dict(evaluate(subject(weights))) == found
    assert {k for k in found if k.startswith('scratch_')} == {
        f'scratch_top1_{n}{s}' for n in ('5_per_class', '10_percent') for s in ('', '_std')
    }
    # Nothing to fine-tune in an untrained encoder: that is training from scratch, which was done.
    seen.clear()
    untrained = subject(weights, seen=seen, random=True)
    untrained.missing()
    seen.clear()
    scratch = {k: v for k, v in found.items() if k.startswith('scratch_')}
    assert dict(evaluate(untrained)) == scratch
    assert {split for split, _ in seen} == {'validation'}  # whose labels are looked at


def test_one_compilation_for_all_sets_draws_rates_and_evaluations(weights, caplog):
    # No other test has this weight_decay, and so has compiled any of it.
    options = {'fractions': (0.3, 0.8), 'learning_rates': (1e-3, 3e-3), 'layer_decay': 0.5}
    options['weight_decay'] = 0.06
    evaluate = finetune.make(**{**OPTIONS, **options, 'min_steps': 2})
    with caplog.at_level(logging.WARNING, 'jax'), jax.log_compiles():
        for _ in range(2):
            dict(evaluate(subject(weights)))
    compiled = re.findall(r'Finished XLA compilation of jit\(_(start|step|logits)\)', caplog.text)
    # From the encoder's weights and from random ones, which have another layer_decay.
    assert sorted(compiled) == ['logits', 'start', 'start', 'step', 'step']


def test_what_it_cannot_serve(weights, caplog):
    assert list(finetune.make()(subject(None))) == []
    with caplog.at_level(logging.INFO, 'absl'):
        assert list(finetune.make()(subject(weights, classes=''))) == []
        assert list(finetune.make(label='speaker')(subject(weights))) == []
        blind = INPUTS._replace(tune=INPUTS.eval)
        assert list(finetune.make()(subject(weights, inputs=blind))) == []
    said = re.findall('fine-tuning is not evaluated: (.*)', caplog.text)
    assert said == [
        'the data has no labels',
        "the data has no label 'speaker'; there is 'label'",
        'the inputs give no views but image',
    ]


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('draws', 0),
        ('epochs', 0),
        ('learning_rates', ()),
        ('learning_rates', (1e-3, 0)),
        ('layer_decay', 0),
        ('batch_size', 0),
    ],
)
def test_wrong_options_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        finetune.make(**{key: value})
