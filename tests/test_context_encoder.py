"""Context encoders beside float64: losses, gradients, masks; who learns from whom."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle as o
import pytest

from contrastive_jax import models
from contrastive_jax.augment.masking import image_key, widened
from contrastive_jax.config import UserError, build
from contrastive_jax.layers import painter
from contrastive_jax.methods import context_encoder
from contrastive_jax.models import dcgan

B, SIDE, WIDTH = 3, 32, 2
ADVERSARY = 0.1
MODEL = {'name': 'dcgan', 'widths': (3, 4)}
SMALL = {'width': WIDTH, 'overlap': 2, 'colour': (10.0, 100.0, 200.0)}


def method(model=MODEL, **options):
    spec = {'name': 'context_encoder', 'adversary': ADVERSARY, **SMALL, **options}
    return build('methods', spec, 'test', build('models', model, 'test'))


def images(seed=0, count=B, side=SIDE):
    values = np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3))
    return values.astype(np.float32)


def started(m, seed=1, side=SIDE):
    """Parameters at random, so that none that is mixed up goes unseen."""
    batch = {'views': jnp.asarray(images(side=side))[:, None]}
    params, extra = m.init(jax.random.key(0), batch, 10)
    rng = np.random.default_rng(seed)

    def drawn(x):
        return np.float32(x + 0.3 * rng.normal(size=x.shape))

    stats = jax.tree.map(lambda x: np.float32(x * rng.uniform(0.5, 2, x.shape)), extra['stats'])
    return jax.tree.map(drawn, params), {'stats': stats}


# The authors' networks, in float64.


def trunk(p, x, averages=None):
    for i in range(1, sum(name.startswith('block') for name in p) + 1):
        of = p[f'block{i}']
        x = o.down(of['kernel'], x)
        if i > 1:
            x = o.normed(of['norm'], x, averages and averages[f'block{i}']['norm'])
        x = o.leaky(x)
    return x


def paint(p, x, averages=None):
    """The decoder on a map [B, h, w, D]; 16 or 32 pixels from one of 4 x 4."""
    of = (lambda name: averages[name]) if averages else lambda name: None
    if 'bottleneck_norm' in p:
        x = x.reshape(len(x), -1) @ p['bottleneck']['kernel']
        x = (
            o.leaky(o.normed(p['bottleneck_norm'], x, of('bottleneck_norm')))
            @ p['spread']['kernel']
        )
    else:
        channels = [
            x[..., d].reshape(len(x), -1) @ p['bottleneck']['kernel'][d] for d in range(x.shape[3])
        ]
        x = jnp.stack(channels, -1) @ p['mix']['kernel']
    x = x.reshape(len(x), 4, 4, -1)
    x = jax.nn.relu(o.normed(p['norm0'], x, of('norm0')))
    for i in range(1, sum(name.startswith('up') for name in p) + 1):
        x = jax.nn.relu(o.normed(p[f'norm{i}'], o.up(p[f'up{i}']['kernel'], x), of(f'norm{i}')))
    return jnp.tanh(o.up(p['out']['kernel'], x))


def judge(p, x):
    """Probability that these pixels are true ones."""
    x = trunk(p, x)
    return 1 / (1 + jnp.exp(-(x.reshape(len(x), -1) @ p['out']['kernel'])))


def hidden_pixels(mask, key):
    """[B, SIDE, SIDE], and around them what is painted, too: the masks as the text has them."""
    hidden = np.zeros((B, SIDE, SIDE), bool)
    if mask == 'centre':
        hidden[:, 10:22, 10:22] = True  # 16 pixels less the overlap of 2
        return hidden
    keys = jax.random.split(jax.random.split(key)[0], B)
    for b in range(B):
        cells = context_encoder.block_mask(keys[b], 1, 16, 16, ratio=0.25, prob=1.0, min_patches=4)
        hidden[b] = np.kron(np.asarray(cells).reshape(16, 16), np.ones((2, 2))) > 0
    return hidden


def around(hidden, by):
    rows = np.argwhere(hidden)
    out = np.zeros_like(hidden)
    for b, i, j in rows:
        out[b, max(i - by, 0) : i + by + 1, max(j - by, 0) : j + by + 1] = True
    return out


def terms(p, x, hidden, mask):
    """(what encoder and decoder minimise, what the critic does), each with both's parameters."""
    colour = np.array(SMALL['colour']) / 127.5 - 1
    asked = around(hidden, 2)
    cut = np.s_[:, 8:24, 8:24] if mask == 'centre' else np.s_[:, :, :]
    painted = paint(p['decoder'], trunk(p['encoder'], np.where(hidden[..., None], colour, x)))
    true, weight = x[cut], np.where(hidden, 1.0, 10.0 * asked)[cut][..., None]
    l2 = (weight * (painted - true) ** 2).sum() / (3 * asked.sum())
    asked = asked[cut][..., None]
    real, fake = judge(p['critic'], asked * true), judge(p['critic'], asked * painted)
    generator = (1 - ADVERSARY) * l2 + ADVERSARY * -jnp.log(fake).mean()
    return generator, -jnp.log(real).mean() - jnp.log(1 - fake).mean()


CASES = [('centre', 0), ('centre', 5), ('blocks', 0)]


@pytest.mark.parametrize(('mask', 'bottleneck'), CASES)
def test_losses_and_gradients_are_the_papers(mask, bottleneck):
    """Each player's gradient is that of its own term alone."""
    m = method(mask=mask, bottleneck=bottleneck, model={**MODEL, 'widths': (3, 4, 5)})
    params, extra = started(m)
    batch, key = {'views': jnp.asarray(images(3))[:, None]}, jax.random.key(7)
    step = jax.jit(jax.value_and_grad(m.loss, has_aux=True))
    (value, aux), gradients = step(params, extra, batch, key, jnp.float32(0))
    hidden = hidden_pixels(mask, key)
    assert hidden.any()

    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        x = images(3).astype(np.float64)
        want = terms(wide, x, hidden, mask)
        of_painter, of_critic = (
            jax.tree.map(
                np.asarray, jax.jit(jax.grad(lambda p, i=i: terms(p, x, hidden, mask)[i]))(wide)
            )
            for i in (0, 1)
        )
        want = tuple(map(float, want))
    assert np.isclose(value, sum(want), rtol=1e-5)
    assert np.isclose(aux.metrics['critic'], want[1], rtol=1e-5)
    wants = {**of_painter, 'critic': of_critic['critic']}
    # The other player's term has a gradient, too, which must not be there.
    assert np.abs(of_painter['critic']['out']['kernel']).max() > 1e-4
    for (path, g), w in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wants), strict=True
    ):
        g, w = np.asarray(g), np.asarray(w)
        assert np.abs(g - w).max() <= 5e-5 * max(np.abs(w).max(), 1e-2), path


def test_without_an_adversary_there_is_no_critic():
    m = method(adversary=0.0)
    params, extra = started(m)
    assert set(params) == set(extra['stats']) == {'encoder', 'decoder'}
    batch = {'views': jnp.asarray(images(3))[:, None]}
    value, aux = m.loss(params, extra, batch, jax.random.key(7), jnp.float32(0))
    assert value == aux.metrics['reconstruction']


@pytest.mark.parametrize('mask', context_encoder.MASKS)
def test_evaluators_see_whole_images_and_filled_holes(mask):
    m = method(mask=mask, model={**MODEL, 'widths': (3, 4, 5)})
    params, extra = started(m)
    x = images(5)
    found = jax.jit(m.encode)(params, extra, {'image': x})
    encoder = build('models', {**MODEL, 'widths': (3, 4, 5)}, 'test')
    averages = extra['stats']
    (features, _), _ = models.apply(encoder, params['encoder'], averages['encoder'], x, False)
    np.testing.assert_allclose(found['features'], features, atol=1e-5)
    assert {'block1', 'block2', 'map'} <= found.keys()
    hidden = np.asarray(found['hidden'])
    assert hidden.shape == (B, SIDE, SIDE, 1)
    away = hidden[..., 0] > 0
    assert away.sum((1, 2)).tolist() == [12 * 12 if mask == 'centre' else 16 * 16] * B
    np.testing.assert_array_equal(found['filled'][~away], x[~away])
    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        wide, averages = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (params, averages))
        colour = np.array(SMALL['colour']) / 127.5 - 1
        shown = np.where(hidden > 0, colour, x.astype(np.float64))
        want = paint(wide['decoder'], trunk(wide['encoder'], shown, averages['encoder']),
                     averages['decoder'])  # fmt: skip
    edge = (SIDE - want.shape[1]) // 2
    want = np.pad(want, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    np.testing.assert_allclose(found['filled'][away], want[away], atol=1e-4)


@pytest.mark.parametrize('side', [8, 36, 64])
def test_blocks_cover_a_quarter_of_images_of_any_size(side):
    model = {'name': 'vit', 'width': 4, 'depth': 1, 'heads': 1, 'patch': 4}
    m = method(model, mask='blocks', adversary=0.0, width=1)
    params, extra = started(m, side=side)
    found = jax.jit(m.encode)(params, extra, {'image': images(1, side=side)})
    assert found['hidden'].sum((1, 2, 3)).tolist() == [side**2 / 4] * B


def test_an_evaluator_s_mask_is_the_image_s_own():
    m = method(mask='blocks')
    params, extra = started(m)
    x = images(6)
    encode = jax.jit(lambda x: m.encode(params, extra, {'image': x})['hidden'])
    hidden, reverse = np.asarray(encode(x)), np.asarray(encode(x[::-1]))
    np.testing.assert_array_equal(hidden, reverse[::-1])
    assert len(np.unique(hidden.reshape(B, -1), axis=0)) == B
    keys = [jax.random.key_data(image_key(jnp.asarray(image))) for image in (x[0], x[0], x[1])]
    assert np.array_equal(keys[0], keys[1])
    assert not np.array_equal(keys[0], keys[2])


def test_what_is_hidden_is_not_seen():
    """Another image under the hole: the same painting, and no other part of it."""
    m = method()
    params, extra = started(m)
    x, other = images(6), images(7)
    encode = jax.jit(lambda x: m.encode(params, extra, {'image': x}))
    hidden = np.asarray(encode(x)['hidden'])
    mixed = np.where(hidden > 0, other, x)
    np.testing.assert_array_equal(encode(x)['filled'], encode(mixed)['filled'])


def test_widened_masks():
    mask = np.zeros((2, 7, 8), bool)
    mask[0, 0, 2], mask[1, 3, 4], mask[1, 6, 7] = True, True, True
    for by in (0, 1, 2):
        np.testing.assert_array_equal(widened(jnp.asarray(mask), by), around(mask, by))


def test_networks_are_the_authors_sizes():
    """Pathak et al. 2016, figure 9, as in train.lua and train_random.lua."""
    assert painter.widths(64, painter.halvings(64)) == (64, 128, 256, 512)
    assert painter.widths(64, painter.halvings(128)) == (64, 64, 128, 256, 512)
    start = jax.eval_shape(
        lambda: models.init(
            painter.Painter(64, 3, 64, 4000), jax.random.key(0), jnp.zeros((1, 16, 512))
        )
    )
    shapes = jax.tree.map(lambda x: x.shape, start[0])
    assert shapes['bottleneck']['kernel'] == (4 * 4 * 512, 4000)
    assert shapes['spread']['kernel'] == (4000, 4 * 4 * 512)
    ups = [shapes[name]['kernel'] for name in ('up1', 'up2', 'up3', 'out')]
    assert ups == [(2, 2, i, 4 * o) for i, o in ((512, 256), (256, 128), (128, 64), (64, 3))]


def test_kernels_start_as_the_authors():
    m = context_encoder.make(dcgan.make(), bottleneck=100)
    batch = {'views': jnp.zeros((1, 1, 128, 128, 3))}
    params, _ = jax.jit(lambda: m.init(jax.random.key(0), batch, 10))()
    kernels = 0
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if name.endswith('kernel'):
            assert 0.019 < float(x.std()) < 0.021, name
            kernels += 1
        else:
            np.testing.assert_array_equal(x, np.full(x.shape, name.endswith('scale')), name)
    assert kernels == 5 + 2 + 4 + 5


def test_parts_of_a_batch_keep_their_own_holes():
    """`config.microbatch`: of an encoder without BatchNorm the same gradients."""
    spec = {'name': 'vit', 'width': 8, 'depth': 1, 'heads': 2, 'patch': 8}
    whole, model = method(spec, mask='blocks'), build('models', spec, 'test')
    parts = context_encoder.make(
        models.Microbatched(model, 2), mask='blocks', adversary=ADVERSARY, **SMALL
    )
    params, extra = started(whole)
    batch = {'views': jnp.asarray(images(9, count=4))[:, None]}
    found = [
        jax.jit(jax.grad(m.loss, has_aux=True))(
            params, extra, batch, jax.random.key(1), jnp.float32(0)
        )[0]
        for m in (whole, parts)
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'mask': 'center'}, r"unknown mask 'center'. Did you mean 'centre'"),
        ({'adversary': 1.0}, r'adversary: got 1.0; context_encoder expects'),
        ({'overlap': -1}, r'overlap: got -1; context_encoder expects'),
        ({'bottleneck': 0.5}, r'bottleneck: got 0.5; context_encoder expects a whole'),
        ({'width': 0}, r'width: got 0; context_encoder expects'),
        ({'colour': (0.0, 300.0, 0.0)}, r'colour\[1\]: got 300.0; context_encoder expects'),
    ],
)
def test_mistakes_are_explained(options, said):
    with pytest.raises(UserError, match=said):
        method(**options)


@pytest.mark.parametrize(
    ('options', 'shape', 'said'),
    [
        ({}, (18, 18), 'images of 18 × 18; .* a multiple of 4'),
        ({'mask': 'blocks'}, (16, 32), 'images of 16 × 32; .* square'),
        ({'overlap': 4}, (16, 16), r'overlap: got 4, which leaves nothing hidden of the 8'),
    ],
)
def test_images_that_do_not_fit_are_refused(options, shape, said):
    batch = {'views': jnp.zeros((2, 1, *shape, 3))}
    with pytest.raises(UserError, match=said):
        method(**options).init(jax.random.key(0), batch, 10)


def test_an_encoder_without_places_is_refused():
    named = {'features': jnp.zeros((1, 3))}
    with pytest.raises(UserError, match=r"config\.model: .* gives 'map' or 'patches'; .*features"):
        painter.places(named)
