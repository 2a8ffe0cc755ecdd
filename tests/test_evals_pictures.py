"""Evaluators that draw: what is seen is where it should be, the same on one device and on eight."""

import io
import logging
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from subjects import subject

from contrastive_jax import evaluation, figures, models
from contrastive_jax.config import UserError, build
from contrastive_jax.evals import attention, filters, knn, neighbours, patches, pca, tsne
from contrastive_jax.evaluation.subject import Weights
from contrastive_jax.figures import plots, sheets

PATCH = 16
H, W = 32, 48  # 2 × 3 patches
TOWER = Weights(models.Microbatched(None, 1), {}, {})  # pyright: ignore[reportArgumentType]
SIDE, MARGIN, APART, GAP, HEADING = 96, 22, 16, 8, 22  # of `sheets.tile_rows`


def patch_means(image_BHWC):
    """From 0 to 1, of sums of integers: exact in any order."""
    x = image_BHWC[..., 0].astype(jnp.int32).reshape(-1, H // PATCH, PATCH, W // PATCH, PATCH)
    return x.sum((2, 4)) / (255 * PATCH**2)


def two_heads(image_BHWC):
    """One looks at what is bright, the other at the opposite patch."""
    x_BN = patch_means(image_BHWC).reshape(-1, 6)
    x_B2N = jnp.stack([x_BN, x_BN[:, ::-1]], 1)
    return x_B2N / x_B2N.sum(2, keepdims=True)


def two_clusters(image_BHWC):
    """Features of bright patches are one point, of dark ones another."""
    bright = (patch_means(image_BHWC) > 0.5)[..., None]
    return jnp.where(bright, jnp.arange(5.0), jnp.array([3.0, 0, 0, 1, 2]))


OUTPUTS = {
    'features': lambda x: patch_means(x).reshape(-1, 6),
    'attention': two_heads,
    'map': two_clusters,
    'patches': lambda x: two_clusters(x).reshape(-1, 6, 5),
}


def encoder(splits, devices=1, names=tuple(OUTPUTS), tower=TOWER, classes=('cat', 'dog'), **more):
    """Of splits (images, labels), whose outputs are functions of patches' brightness."""
    outputs = {name: OUTPUTS[name] for name in names}
    encode = jax.jit(lambda batch, name: outputs[name](batch['image']), static_argnums=1)
    options = {'devices': devices, 'batch': 16, 'classes': classes, 'weights': tower}
    return subject(splits, encode, **options, **more)


def bright(places, level=230, dark=25):
    """Images that are dark but for one patch each."""
    images = np.full((len(places), H, W, 3), dark, np.uint8)
    for image, place in zip(images, places, strict=True):
        r, c = divmod(place, 3)
        image[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH] = level
    return images


def opened(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB')).astype(int)


def tile(sheet, row, column, headings=True, captions=False):
    """[H, W, 3] of a picture in `tile_rows`, at the size that it was drawn at."""
    x = MARGIN + column * (SIDE + GAP) + (APART if column else 0)
    y = MARGIN + HEADING * headings + row * (SIDE + (44 if captions else GAP))
    # 48 × 32 pixels, enlarged by 2, in the middle of a square.
    return sheet[y + 16 : y + 80, x : x + 96]


def in_patches(picture):
    """The colour in the middle of each patch."""
    h, w = picture.shape[0] // 2, picture.shape[1] // 3
    return [tuple(picture[r * h + h // 2, c * w + w // 2]) for r in range(2) for c in range(3)]


def dataset(places, label=None):
    label = np.zeros(len(places), np.int32) if label is None else np.array(label, np.int32)
    return bright(places), label


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize('devices', [1, 8])
def test_attention_is_drawn_where_it_is(devices):
    places = [0, 5, 2, 4, 1]
    e = encoder({'test': dataset(places)}, devices)
    ((name, png),) = attention.make(count=5)(e)
    assert name == 'heads'
    sheet = opened(png)
    assert sheet.shape[1] == 2 * MARGIN + 4 * SIDE + 3 * GAP + APART
    for row, place in enumerate(places):
        seen = tile(sheet, row, 0)
        assert np.array_equal(seen[::2, ::2], bright([place])[0])
        for column, expected in ((1, [place]), (2, [5 - place]), (3, [place, 5 - place])):
            light = np.array(in_patches(tile(sheet, row, column))).sum(1)
            assert set(np.flatnonzero(light == light.max())) == set(expected)
            assert light.max() > 2 * np.partition(light, -3)[-3]


def test_the_mass_that_is_kept_is_dinos():
    weights = np.random.default_rng(0).random((3, 2, 12))
    weights /= weights.sum(2, keepdims=True)
    for mass in (0.1, 0.6, 0.95, 1.0):
        # DINO's code: ascending, those whose cumulative sum is above 1 − mass.
        order = np.argsort(weights, 2)
        above = np.cumsum(np.take_along_axis(weights, order, 2), 2) > 1 - mass
        expected = np.zeros_like(weights)
        np.put_along_axis(expected, order, np.take_along_axis(weights, order, 2) * above, 2)
        assert np.array_equal(attention.kept(weights, mass), expected)


def test_a_map_of_the_mass_is_black_elsewhere():
    e = encoder({'test': dataset([3])})
    ((_, whole),) = attention.make()(e)
    ((_, most),) = attention.make(mass=0.5)(e)
    heads = [in_patches(tile(opened(png), 0, 1)) for png in (whole, most)]
    black = tuple(figures.heat(np.eye(2))[0, 1])
    assert heads[1].count(black) == 5
    assert heads[0].count(black) == 0
    assert heads[0][3] == heads[1][3]


# --- PCA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('names', [('patches', 'map'), ('map',)])
def test_two_clusters_have_two_colours(names, devices):
    places = [1, 4, 0]
    e = encoder({'test': dataset(places)}, devices, names)
    ((name, png),) = pca.make(foreground=False)(e)
    assert name == 'patches'
    views = pictures(png, 3)
    for place, (image, drawn) in zip(places, views, strict=True):
        assert np.argmax(np.array(in_patches(image)).sum(1)) == place
        colours = in_patches(drawn)
        assert Counter(colours).most_common()[0][1] == 5
        assert Counter(colours)[colours[place]] == 1
    # The same in all images.
    assert len({in_patches(v[1])[p] for p, v in zip(places, views, strict=True)}) == 1


def pictures(png, count):
    """[count] pairs of image and components from a sheet of `views_grid`."""
    sheet = opened(png)
    scale = round(sheets.SIDE / W)
    height, width, gap, margin = H * scale, W * scale, 4, 18
    columns = (sheet.shape[1] - margin) // (2 * width + gap + margin)
    found = []
    for b in range(count):
        x = margin + b % columns * (2 * width + gap + margin)
        y = margin + b // columns * (height + margin)
        some = sheet[y : y + height]
        found.append((some[:, x : x + width], some[:, x + width + gap : x + 2 * width + gap]))
    return found


def test_the_background_is_dark_and_the_foreground_has_components_of_its_own():
    rng = np.random.default_rng(0)
    shape = (4, 6, 6, 8)
    middle = np.zeros(shape[:3], bool)
    middle[:, 2:4, 2:4] = True
    x = rng.normal(0, 0.01, shape)
    x[..., 0] += np.where(middle, 5.0, -5.0)
    parts = np.zeros(shape[:3], bool)
    parts[:, 2, 2:4] = True
    x[..., 1] += np.where(parts, 1.0, -1.0) * middle
    for sign in (1, -1):
        drawn = pca.colours(sign * x, foreground=True).astype(int)
        assert (drawn[~middle] == pca.BACKGROUND).all()
        # Red is the second cluster's component, from one end of its range to the other.
        red = drawn[..., 0]
        ends = sorted([red[parts].mean(), red[middle & ~parts].mean()])
        assert ends[0] < 20
        assert ends[1] > 235


def test_components_are_sklearns():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(50, 7)) @ np.diag(np.arange(1.0, 8.0))
    theirs = PCA(3).fit_transform(x)
    assert np.allclose(np.abs(pca.components(x, 3)), np.abs(theirs), atol=1e-9)
    assert np.array_equal(pca.components(x, 3), pca.components(x.copy(), 3))
    assert pca.components(x[:, :2], 3).shape == (50, 3)


def test_equal_patches_are_drawn_too():
    drawn = pca.colours(np.ones((2, 3, 3, 4)), foreground=True)
    assert len(np.unique(drawn)) == 1


# --- neighbours ----------------------------------------------------------------------------------


@pytest.mark.parametrize('devices', [1, 8])
def test_neighbours_are_the_nearest_and_the_wrong_ones_are_marked(devices):
    train = dataset([0, 0, 1, 1, 5, 2, 3], [0, 1, 0, 0, 1, 0, 1])
    test = dataset([1, 0, 5], [0, 0, 1])
    e = encoder({'train': train, 'test': test}, devices)
    ((name, png),) = neighbours.make(count=3, k=2)(e)
    assert name == 'sheet'
    sheet = opened(png)
    assert sheet.shape[1] == 2 * MARGIN + 3 * SIDE + 2 * GAP + APART
    assert sheet.shape[0] == 2 * MARGIN + HEADING + 3 * (SIDE + 44)
    orange = (np.array(to_rgb(figures.COLOURS[1])) * 255).round()
    # The second image at place 0 is a dog; place 5's second neighbour is at another place.
    expected = {1: [(1, 0), (1, 0)], 0: [(0, 0), (0, 1)], 5: [(5, 0)]}
    for row, place in enumerate([1, 0, 5]):
        assert np.array_equal(tile(sheet, row, 0, captions=True)[::2, ::2], bright([place])[0])
        for column, (at, wrong) in enumerate(expected[place], 1):
            seen = tile(sheet, row, column, captions=True)
            assert np.array_equal(seen[::2, ::2], bright([at])[0])
            x = MARGIN + column * (SIDE + GAP) + APART
            y = MARGIN + HEADING + row * (SIDE + 44)
            framed = (sheet[y - 2, x : x + SIDE] == orange).all()
            assert framed == bool(wrong)


def test_fewer_neighbours_than_asked_for_and_none_of_unusable_images():
    images, label = dataset([0, 1, 2])
    images[1] = 0  # a bad record
    e = encoder({'train': (images, label), 'test': dataset([1])})
    ((_, png),) = neighbours.make(count=4, k=10)(e)
    assert opened(png).shape[1] == 2 * MARGIN + 3 * SIDE + 2 * GAP + APART


# --- t-SNE and confusion -------------------------------------------------------------------------


def clusters(count=60):
    """Two places with some noise in brightness."""
    label = np.arange(count) % 2
    images = bright(np.where(label == 0, 0, 5))
    noise = np.random.default_rng(0).integers(-20, 20, (count, 1, 1, 1))
    return (images + noise).clip(1, 255).astype(np.uint8), label.astype(np.int32)


def hue(i):
    return (np.array(to_rgb(plots.HUES[i])) * 255).round()


def test_a_map_separates_clusters():
    drawn = dict(tsne.make(perplexity=10)(encoder({'test': clusters()})))['map']
    picture = opened(drawn)
    at = [np.argwhere(np.abs(picture - hue(i)).sum(-1) < 60) for i in (0, 1)]
    # Points alone, not the legend's.
    at = [a[a[:, 1] < 0.75 * picture.shape[1]] for a in at]
    assert min(map(len, at)) > 30
    middle = [a.mean(0) for a in at]
    assert np.linalg.norm(middle[0] - middle[1]) > 2 * max(a.std(0).max() for a in at)
    y = tsne.embed(np.random.default_rng(0).normal(size=(70, 60)), 5.0, seed=1)
    assert y.shape == (70, 2)


def test_of_many_classes_some_are_drawn(monkeypatch):
    seen = {}

    def scatter(x_N2, label_N, names, title):
        seen.update(x=x_N2, label=label_N, title=title)
        return b''

    monkeypatch.setattr(figures, 'scatter', scatter)
    images, _ = clusters(64)
    label = np.arange(64, dtype=np.int32) % 32
    e = encoder({'test': (images, label)}, classes=tuple(map(str, range(32))))
    dict(tsne.make(classes=8)(e))
    assert len(np.unique(seen['label'])) == 8
    assert seen['title'] == 't-SNE of 16 test records of 8 of 32 classes'
    dict(tsne.make(count=20)(encoder({'test': (images, np.full(64, -1, np.int32))})))
    assert seen['title'] == 't-SNE of 20 test records'
    assert len(seen['x']) == 20


@pytest.mark.parametrize('classes', [1, 23])
def test_names_that_mean_something_to_matplotlib(classes):
    names = ['_$x$, or y', '$', *map(str, range(21))][:classes]
    x = np.random.default_rng(0).normal(size=(50, 2))
    png = figures.scatter(x, np.arange(50) % classes, names, 'title')
    assert opened(png).shape[1] > 600
    counts = np.diag(np.arange(classes) + 1)
    counts[0, -1] += 3
    assert opened(figures.confusion(counts, names, '100 % of $2')).shape[1] > 300


def test_the_nearest_places_are_those_of_other_images_that_look_the_same():
    x = np.random.default_rng(0).normal(size=(5, 6, 4))
    x[3, 2] = 2 * (x[1, 4] - x.mean((0, 1)))  # nearly the same direction
    score = patches.cosines(x, 1, 4)
    y = x - x.mean((0, 1))
    y /= np.linalg.norm(y, axis=2, keepdims=True)
    rest = np.arange(5) != 1
    np.testing.assert_allclose(score[rest], (y @ y[1, 4])[rest], atol=1e-12)
    assert (score[1] == -np.inf).all()
    assert np.unravel_index(score.argmax(), score.shape) == (3, 2)


def test_the_place_has_a_frame():
    image = bright([0])[0]
    drawn = patches.framed(image, 4, 2, 3)
    scale = patches.SIDE // max(image.shape[:2])
    assert drawn.shape == (scale * H, scale * W, 3)
    changed = (drawn != image.repeat(scale, 0).repeat(scale, 1)).any(-1)
    r, c = np.nonzero(changed)
    side = scale * PATCH
    assert (r.min(), r.max(), c.min(), c.max()) == (side, 2 * side - 1, side, 2 * side - 1)
    assert not changed[side + side // 2, side + side // 2]


@pytest.mark.parametrize(
    ('spec', 'path'),
    [
        ({'name': 'resnet', 'stem': 'patch4', 'widths': (8,), 'blocks': (1,)}, ('stem', 'kernel')),
        ({'name': 'nin', 'blocks': 2}, ('block1', 'conv1', 'kernel')),
        (
            {'name': 'vit', 'width': 16, 'depth': 1, 'heads': 2, 'patch': 4},
            ('patch_embedding', 'kernel'),
        ),
    ],
)
def test_filters_of_the_first_layer(spec, path):
    module = build('models', spec, 'test')
    params = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False)['params']
    kernel = params
    for name in path:
        kernel = kernel[name]
    found = filters.first(params)
    side = 5 if spec['name'] == 'nin' else 4
    np.testing.assert_array_equal(found, np.reshape(kernel, (side, side, 3, -1)))
    drawn = filters.pictures(found, 6)
    norms = np.linalg.norm(found.reshape(-1, found.shape[-1]), axis=0)
    best = found[..., norms.argmax()]
    np.testing.assert_allclose(drawn[0], 0.5 + best / np.abs(best).max() / 2, atol=1e-6)
    assert drawn.shape == (6, side, side, 3)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    weights = Weights(module, params, {})
    seen = encoder({'test': dataset([0, 1])}, tower=weights)
    ((name, picture),) = filters.make(count=4)(seen)
    assert name == 'first_layer'
    assert opened(picture).ndim == 3
    assert filters.first({'dense': {'kernel': np.zeros((4, 4))}}) is None


@pytest.mark.parametrize('devices', [1, 8])
def test_the_confusion_is_counted_by_class(devices, monkeypatch):
    train = dataset([0, 0, 5, 5], [0, 0, 1, 1])
    test = dataset([0, 0, 5, 5, 0, 5], [0, 0, 1, 1, 1, -1])
    e = encoder({'train': train, 'test': test}, devices)
    seen = {}
    whole = figures.confusion
    monkeypatch.setattr(
        figures, 'confusion', lambda counts, *more: seen.update(c=counts) or whole(counts, *more)
    )
    found = dict(knn.make(k=1, per_class=(), confusion=True)(e))
    assert found['top1'] == 0.8
    assert seen['c'].tolist() == [[2, 0], [1, 2]]
    picture = opened(found['confusion'])
    blue = np.abs(picture - hue(0)).sum(-1) < 20
    assert blue.any(0).argmax() < blue.any(0)[::-1].argmax()  # the full cell is on the left


# --- all -----------------------------------------------------------------------------------------


def test_one_and_eight_devices_draw_the_same_bytes():
    splits = {'train': clusters(40), 'test': clusters(24)}
    evaluators = [m.make() for m in (attention, pca, neighbours, patches, tsne, knn)]
    found = [
        [pair for evaluate in evaluators for pair in evaluate(encoder(splits, devices))]
        for devices in (1, 8)
    ]
    assert found[0] == found[1]
    assert sum(isinstance(value, bytes) for _, value in found[0]) == 5


@pytest.mark.parametrize('make', [attention.make, pca.make, patches.make])
@pytest.mark.parametrize('why', ['raw pixels', 'no such output', 'no usable image'])
def test_what_cannot_be_drawn_is_said_once(make, why, caplog):
    bad = (0, 1) if why == 'no usable image' else ()
    names = ('features',) if why == 'no such output' else tuple(OUTPUTS)
    tower = None if why == 'raw pixels' else TOWER
    e = encoder({'test': dataset([0, 1])}, names=names, tower=tower, bad=bad)
    evaluate = make()
    with caplog.at_level(logging.INFO, 'absl'):
        assert list(evaluate(e)) == list(evaluate(e)) == []
    said = [r for r in caplog.records if 'bad record' not in r.getMessage()]
    assert len(said) == 1
    assert 'not evaluated' in caplog.text


def test_neither_maps_nor_neighbours_of_nothing(caplog):
    one = encoder({'train': dataset([0])})
    same = encoder({'test': dataset([0] * 9)})
    with caplog.at_level(logging.INFO, 'absl'):
        assert list(neighbours.make()(one)) == []
        assert list(tsne.make()(one)) == []
        assert list(tsne.make()(same)) == []
    assert [r.getMessage().partition(': ')[2] for r in caplog.records] == [
        'there is no test split',
        'there are too few records',
        'all features are the same',
    ]


def test_wrong_options_are_refused():
    for make, key, value in [
        (attention.make, 'count', 0),
        (attention.make, 'mass', 0.0),
        (attention.make, 'mass', 1.5),
        (pca.make, 'count', 0),
        (neighbours.make, 'k', 0),
        (neighbours.make, 'count', 0),
        (patches.make, 'count', 0),
        (patches.make, 'k', 0),
        (patches.make, 'records', 1),
        (filters.make, 'count', 0),
        (tsne.make, 'count', 1),
        (tsne.make, 'classes', 0),
        (tsne.make, 'perplexity', 0.0),
    ]:
        with pytest.raises(UserError, match=key):
            make(**{key: value})


def test_samples_are_spread_over_the_split():
    assert evaluation.spread(10, 3).tolist() == [1, 5, 8]
    assert evaluation.spread(2, 5).tolist() == [0, 1]
    e = encoder({'train': dataset([0] * 4), 'test': dataset([0, 1, 2, 3, 4, 5])})
    assert np.array_equal(e.sample(3)['image'], bright([1, 3, 5]))
