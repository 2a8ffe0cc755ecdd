"""Evaluators of images with texts against NumPy and scikit-learn, on one device and on eight."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.metrics import recall_score, top_k_accuracy_score

from contrastive_jax import parallel
from contrastive_jax.config import UserError
from contrastive_jax.evals import retrieval, zeroshot
from contrastive_jax.evaluation.subject import put

D = 24


def encoder(
    x=None, label=None, captions=None, texts=None, devices=1, classes=(), reads_text=True
) -> Any:
    """An encoder as evaluators see it; `texts` has the embedding of every text."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    x = np.zeros((4, D), np.float32) if x is None else x
    label = np.full(len(x), -1, np.int32) if label is None else label

    def features(split, name='features', _='label'):
        assert (split, name) == ('test', 'embedding')
        # As a last batch of 48 is padded.
        padding = -len(x) % 48
        padded = np.pad(x, ((0, padding), (0, 0))), np.pad(label, (0, padding), constant_values=-1)
        return put(mesh, *padded)

    def encode(some):
        assert len(set(some)) == len(some)
        table = np.stack([texts[text] for text in some]).astype(np.float32)
        return put(mesh, table, np.zeros(len(some), np.int32)).x_ND

    return SimpleNamespace(
        mesh=mesh,
        splits=('train', 'test'),
        classes={'label': list(classes)} if classes else {},
        reads_text=reads_text,
        features=features,
        texts=encode,
        captions=lambda split: captions,
    )


def pairs(seed: int, images: int, ties: bool):
    """(images' embeddings, captions, embeddings of texts); 0 to 4 captions an image, one bad."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, D)) * np.geomspace(0.01, 100, images)[:, None]
    captions = [[f'{i} {j}' for j in range(rng.integers(0, 5))] for i in range(images)]
    captions[0] = ['0 0']  # there is one, but the picture was bad
    texts = {
        text: 3 * x[i] / np.linalg.norm(x[i]) + rng.normal(size=D) * 3
        for i, own in enumerate(captions)
        for text in own
    }
    if ties:
        x[5:25:2] = x[6:26:2]  # one picture twice
        x[30] = 2 * x[31]  # of one direction
        names = list(texts)
        for a, b in zip(names[10:70:3], names[50:110:3], strict=True):
            texts[a] = texts[b]  # other words, same embedding
        captions[40] = captions[41]  # same words
        captions[42] = [*captions[42], *captions[43], names[90], names[90]]
        x[44:60] = x[44]
    x[0] = 0
    return x.astype(np.float32), captions, {k: v.astype(np.float32) for k, v in texts.items()}


def rank(scores_MN, own_MN):
    """The definition, row by row."""
    best_M = np.where(own_MN, scores_MN, -np.inf).max(1)
    return 1 + ((scores_MN >= best_M[:, None]) & ~own_MN).sum(1)


def cosines(a_MD, b_ND):
    """float64 [M, N]; equal rows have equal bits, which a matrix product does not promise."""
    (a, at_M), (b, at_N) = (np.unique(x, axis=0, return_inverse=True) for x in (a_MD, b_ND))
    a, b = (x.astype(np.float64) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return (a @ b.T).round(9)[at_M.ravel()][:, at_N.ravel()]


# --- retrieval -----------------------------------------------------------------------------------


@pytest.mark.parametrize('ties', [False, True])
def test_retrieval_is_the_definition(ties):
    x, captions, texts = pairs(0, 90, ties)
    kept = [i for i, own in enumerate(captions) if own and x[i].any()]
    assert 0 < len(kept) < 89
    own = np.array([i for i in kept for _ in captions[i]])
    y = np.stack([texts[text] for i in kept for text in captions[i]])
    scores_MN = cosines(x[kept], y)
    own_MN = np.array(kept)[:, None] == own[None, :]
    expected = {}
    for direction, found in [
        ('image_to_text', rank(scores_MN, own_MN)),
        ('text_to_image', rank(scores_MN.T, own_MN.T)),
    ]:
        assert 1 < np.median(found) < 30
        expected |= {f'{direction}_r{k}': (found <= k).mean() for k in (1, 5, 10)}
        expected[f'{direction}_median_rank'] = np.median(found)
    for devices, tile in [(1, 1024), (8, 7)]:
        e = encoder(x, None, captions, texts, devices)
        found = list(retrieval.make(tile=tile)(e))
        assert dict(found) == expected
        assert [name for name, _ in found] == list(expected)


def test_every_tie_counts_against_the_model():
    x = np.eye(D, dtype=np.float32)[[0, 0, 1, 2]]
    texts = {'a': x[0], 'b': 5 * x[0], 'c': x[2], 'd': x[3], 'e': -x[3]}
    e = encoder(x, None, [['a'], ['b'], ['c'], ['e', 'd']], texts)
    found = dict(retrieval.make(k=(1, 2))(e))
    # a and b meet two images and two captions; d is found though e is not.
    assert found['image_to_text_r1'] == 0.5
    assert found['image_to_text_r2'] == 1
    assert found['text_to_image_r1'] == 0.4
    assert found['text_to_image_r2'] == 0.8
    # An encoder for which everything is one, or nothing is a number, retrieves nothing.
    for value in (np.float32(0.1), np.float32(np.nan), np.float32(np.inf)):
        same = dict.fromkeys(texts, np.full(D, value))
        e = encoder(np.full((4, D), value), None, [['a'], ['b'], ['c'], ['e', 'd']], same)
        found = dict(retrieval.make(k=(3,))(e))
        assert found['image_to_text_r3'] == found['text_to_image_r3'] == 0
        assert found['text_to_image_median_rank'] == 4


@pytest.mark.parametrize('width', [1, 3, 64, 515])
def test_ranks_are_exact_in_whole_numbers(width):
    """Of a collapsed encoder, where rounding decides most comparisons, on any devices and tiles."""
    rng = np.random.default_rng(width)
    centre = rng.choice([-1, 1], width) * (0.9 + 0.2 * rng.random(width))
    x, y = (centre + rng.normal(size=(n, width)) * 1e-5 for n in (150, 70))
    x[::3], y[::5], y[11:30], x[7] = x[1], y[2], x[11:30], centre
    group_M, group_N = rng.integers(0, 35, 150), np.repeat(np.arange(35), 2)
    fine = retrieval._fine(width)
    grids = (retrieval._grid(z.astype(np.float32)).astype(np.int64) for z in (x, y))
    a, b = (grid[:, :width] * fine + grid[:, width:] for grid in grids)
    scores_MN = a @ b.T
    expected = rank(scores_MN, group_M[:, None] == group_N[None, :])
    for devices, tile in [(1, 1024), (1, 13), (8, 1024), (8, 13)]:
        mesh = parallel.make_mesh(jax.devices()[:devices])
        found = retrieval.ranks(
            mesh, x.astype(np.float32), group_M, y.astype(np.float32), group_N, tile
        )
        np.testing.assert_array_equal(found, expected)
    # They are the cosines.
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    unit = ((4096 - width**0.5) * fine) ** 2
    np.testing.assert_allclose(scores_MN / unit, x @ y.T, atol=3e-6)


def test_sums_of_the_grid_fit_float32():
    """Whatever the signs: sums of absolute values, of rows whose roundings all go one way."""
    for width in (1, 2, 100, 512, 4096):
        for up in np.linspace(0, 2, 41):
            flat = np.full((1, width), 1.0)
            flat[0, : width // 2] += up / 4096 * width**0.5
            for x in (flat, np.eye(width)[:1], np.arange(1.0, width + 1)[None]):
                grid = np.abs(retrieval._grid(x.astype(np.float32))).astype(np.float64)[0]
                h, l = grid[:width], grid[width:]
                assert np.linalg.norm(h) <= 4096
                assert l.max() <= 2048 / width**0.5


@pytest.mark.parametrize('why', ['no text', 'no captions', 'no pairs', 'no split'])
def test_retrieval_says_once_why_not(why, caplog):
    x = np.ones((3, D), np.float32)
    e = encoder(
        x,
        captions={'no captions': None, 'no pairs': [[]] * 3}.get(why, [['a']] * 3),
        texts={'a': x[0]},
        reads_text=why != 'no text',
    )
    evaluate = retrieval.make(split='validation' if why == 'no split' else 'test')
    with caplog.at_level(logging.INFO, 'absl'):
        assert list(evaluate(e)) == list(evaluate(e)) == []
    assert len(caplog.records) == 1
    assert 'not evaluated' in caplog.text


# --- zero-shot -----------------------------------------------------------------------------------

NAMES = ['cat', 'sea_lion', 'Tuk-tuk', 'dog', 'oak', 'elm', 'car']


def labelled(seed=0, n=230):
    """(embeddings, labels with some −1 and no 'elm', embeddings of texts of two templates)."""
    rng = np.random.default_rng(seed)
    texts = {}
    for name in NAMES:
        centre = rng.normal(size=D)
        for sentence in (f'a {name}.', f'{name} {{}}, {name}', f'a photo of a {name}.'):
            texts[sentence.replace('_', ' ')] = (centre + rng.normal(size=D) / 2) * rng.random()
    label = rng.choice([-1, 0, 1, 2, 3, 4, 6], n).astype(np.int32)
    centres = np.stack([texts[f'a photo of a {name.replace("_", " ")}.'] for name in NAMES])
    x = 3 * centres[label] + rng.normal(size=(n, D))
    return x.astype(np.float32), label, {k: v.astype(np.float32) for k, v in texts.items()}


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('templates', [('a photo of a {}.',), ('a {}.', '{} {}, {}')])
def test_zeroshot_is_sklearns(devices, templates):
    x, label, texts = labelled()
    texts |= {
        f'{n} {n}, {n}'.replace('_', ' '): texts[f'{n} {{}}, {n}'.replace('_', ' ')] for n in NAMES
    }
    e = encoder(x, label, texts=texts, devices=devices, classes=NAMES)
    found = dict(zeroshot.make(templates=templates, k=(1, 3, 9), per_class=True)(e))
    W = []
    for name in NAMES:
        y = [texts[t.replace('{}', name.replace('_', ' '))].astype(np.float64) for t in templates]
        W.append(np.mean([v / np.linalg.norm(v) for v in y], axis=0))
    W = np.stack(W) / np.linalg.norm(W, axis=1, keepdims=True)
    some = label >= 0
    scores, right = (x @ W.T)[some], label[some]
    for k in (1, 3):
        expected = top_k_accuracy_score(right, scores, k=k, labels=np.arange(7))
        assert found[f'top{k}'] == expected
    assert 0.2 < found['top1'] < 0.99
    for c in np.unique(right):
        accuracy = (scores[right == c].argmax(1) == c).mean()
        assert found[f'top1/{NAMES[c]}'] == accuracy
    mean = recall_score(right, scores.argmax(1), labels=np.unique(right), average='macro')
    assert found['mean_per_class'] == pytest.approx(mean, abs=1e-12)
    present = [f'top1/{NAMES[c]}' for c in np.unique(right)]
    assert list(found) == ['top1', 'top3', *present, 'mean_per_class']
    assert 'top1/elm' not in found
    few = dict(zeroshot.make(templates=templates, k=(1, 3))(e))
    assert few == {name: found[name] for name in ('top1', 'top3')}


def test_zeroshot_names_templates_and_files(tmp_path):
    x, label, _ = labelled()
    asked = []
    e = encoder(x, label, classes=NAMES)
    e.texts = lambda some: (
        asked.append(some)
        or put(e.mesh, np.ones((len(some), D), np.float32), np.zeros(len(some), np.int32)).x_ND
    )

    def asks(**options):
        assert dict(zeroshot.make(**options)(e))['top1'] == 0  # all tie
        return asked.pop()

    other = [*'abcdef', 'g h_i']
    assert asks() == [f'a photo of a {name.replace("_", " ")}.' for name in NAMES]
    assert asks(classes=other, templates='{}')[-1] == 'g h_i'
    assert asks(classes=other, templates=['{}', '2 {c} {}'])[:3] == ['a', '2 {c} a', 'b']
    listed, lines, both = (tmp_path / name for name in ('a.json', 'a.txt', 'both.json'))
    listed.write_text(json.dumps(other))
    lines.write_text('\n'.join(other) + '\n\n')
    assert asks(classes=str(listed)) == asks(classes=str(lines)) == asks(classes=tuple(other))
    both.write_text(json.dumps({'classes': other, 'templates': ['<{}>']}))
    assert asks(prompts=str(both)) == [f'<{name}>' for name in other]
    assert asks(prompts=str(both), classes=NAMES)[1] == '<sea_lion>'
    both.write_text(json.dumps({'templates': ['<{}>']}))
    assert asks(prompts=str(both))[1] == '<sea lion>'
    both.write_text(json.dumps({'classes': other}))
    assert asks(prompts=str(both), templates=['[{}]'])[0] == '[a]'
    for text, found in [('[', 'read'), ('[1]', 'holds no'), ('{"classes": "a"}', 'list')]:
        both.write_text(text)
        with pytest.raises(UserError, match=found):
            zeroshot.make(prompts=str(both))
    with pytest.raises(UserError, match=r'expected one for each of the 7 .*sea_lion'):
        list(zeroshot.make(classes=['a', 'b'])(e))
    with pytest.raises(UserError, match=r"another order: label 0's is 'Car'; expected 'cat'"):
        list(zeroshot.make(classes=['Car', *NAMES[1:6], 'cat'])(e))


@pytest.mark.parametrize(
    ('name', 'count', 'some'),
    [
        ('cifar10', 10, {0: 'airplane', 9: 'truck'}),
        ('cifar100', 100, {1: 'aquarium fish', 50: 'mouse', 99: 'worm'}),
        ('digits', 10, {0: 'zero', 9: 'nine'}),
        ('imagenet', 1000, {0: 'tench', 207: 'Golden Retriever', 999: 'toilet paper'}),
    ],
)
def test_shipped_prompts(name, count, some):
    zeroshot.make(prompts=name)
    found = json.loads((zeroshot.PROMPTS / f'{name}.json').read_text())
    assert len(found['classes']) == count
    assert {i: found['classes'][i] for i in some} == some


@pytest.mark.parametrize('why', ['no text', 'no labels', 'no classes', 'no split'])
def test_zeroshot_says_once_why_not(why, caplog):
    x, label, texts = labelled()
    e = encoder(
        x,
        None if why == 'no labels' else label,
        texts=texts,
        classes=() if why == 'no classes' else NAMES,
        reads_text=why != 'no text',
    )
    evaluate = zeroshot.make(split='validation' if why == 'no split' else 'test')
    with caplog.at_level(logging.INFO, 'absl'):
        assert list(evaluate(e)) == list(evaluate(e)) == []
    assert len(caplog.records) == 1
    assert 'not evaluated' in caplog.text


def test_wrong_options_are_refused(tmp_path):
    for make, options, text in [
        (retrieval.make, {'k': (0,)}, 'k'),
        (retrieval.make, {'k': ()}, 'k'),
        (retrieval.make, {'tile': 0}, 'tile'),
        (zeroshot.make, {'k': (5, -1)}, 'k'),
        (zeroshot.make, {'templates': ['a {}', 'a {c}']}, "templates: got 'a {c}'"),
        (zeroshot.make, {'templates': ()}, 'templates'),
        (zeroshot.make, {'prompts': 'cifar11'}, "unknown name 'cifar11'.*'cifar10'"),
        (zeroshot.make, {'prompts': str(tmp_path / 'no.json')}, 'prompts: .*no.json'),
        (zeroshot.make, {'classes': str(tmp_path / 'no.txt')}, 'classes: .*no.txt'),
    ]:
        with pytest.raises(UserError, match=text):
            make(**options)


def test_names_of_two_classes_are_said(caplog):
    with caplog.at_level(logging.WARNING, 'absl'):
        zeroshot.make(classes=['crane', 'tench', 'crane'])
    assert '(1)' in caplog.text
