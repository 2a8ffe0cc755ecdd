"""Colours as classes: bins, targets, weights, the loss in float64; what grey images change."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle as o
import pytest
from test_methods import MODELS

from contrastive_jax import models, optim, parallel, state
from contrastive_jax.augment import lab
from contrastive_jax.config import UserError, build
from contrastive_jax.losses import color

CENTRES = color.bins()
Q = len(CENTRES)
B, SIDE = 8, 8
VIT = {'name': 'lab', 'sees': ('L',), 'encoder': MODELS['vit']}


def method(model=VIT, name='colorization', **options):
    model = build('models', model, 'test')
    return build('methods', {'name': name, 'width': 6, **options}, 'test', model)


def batch(seed=0, count=B, grey=()):
    """Images whose colours are in the gamut, some of them grey."""
    rng = np.random.default_rng(seed)
    rgb = rng.uniform(size=(count, 1, SIDE, SIDE, 3)).astype(np.float32)
    for i in grey:
        rgb[i] = rgb[i, ..., :1]
    x = lab.rgb_to_lab(jnp.asarray(rgb))
    return {'views': lab.scaled(x), 'lab': x}


def started(m, seed=1):
    """Parameters and a prior at random, so that none that is mixed up goes unseen."""
    params, extra = jax.jit(m.init, static_argnums=2)(jax.random.key(0), batch(), 10)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)
    return params, {**extra, 'prior': np.float32(rng.dirichlet(np.full(Q, 0.1)))}


class TestBins:
    def test_they_are_the_corners_of_squares_with_colours(self):
        """By all colours of a coarser cube; none of them, and no other bin, is missing."""
        level = np.linspace(0, 1, 86)  # every third of 256
        rgb = np.stack(np.meshgrid(level, level, level), -1).reshape(-1, 3)
        square = np.floor(lab.rgb_to_lab(rgb, np)[:, 1:] / 10)
        corners = {
            (10 * (a + i), 10 * (b + j))
            for a, b in set(map(tuple, square))
            for i, j in np.ndindex(2, 2)
        }
        bins = set(map(tuple, CENTRES))
        assert corners <= bins
        assert len(bins) == Q == 309
        assert len(bins - corners) < 5  # squares that only finer colours meet
        assert tuple(CENTRES[0]) == (-90, 50)

    def test_nearest_is_the_corner_of_the_colour_s_own_square(self):
        rgb = np.random.default_rng(0).uniform(size=(2000, 3))
        ab = lab.rgb_to_lab(rgb, np)[:, 1:]
        nearest = ((ab[:, None] - CENTRES) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(CENTRES[nearest], 10 * np.round(ab / 10))

    def test_another_grid_has_other_bins(self):
        assert len(color.bins(20.0)) < Q / 3
        assert not (color.bins(20.0) % 20).any()


@pytest.mark.parametrize('neighbours', [1, 5, 10])  # 5 in the paper, 10 in the authors' code
def test_soft_encoding_by_brute_force(neighbours):
    ab = np.random.default_rng(0).uniform(-100, 100, (3, 4, 2)).astype(np.float32)
    found = np.asarray(
        jax.jit(lambda x: color.soft_encoding(x, CENTRES, neighbours=neighbours))(ab)
    )
    assert found.shape == (3, 4, Q)
    for at in np.ndindex(3, 4):
        square = [float((np.float64(ab[at]) - c) @ (np.float64(ab[at]) - c)) for c in CENTRES]
        near = sorted(range(Q), key=square.__getitem__)[:neighbours]
        weight = np.exp([-(square[i] - min(square)) / 50 for i in near])
        wanted = np.zeros(Q)
        wanted[near] = weight / weight.sum()
        np.testing.assert_allclose(found[at], wanted, atol=1e-4)
        assert (found[at] > 0).sum() <= neighbours


@pytest.mark.parametrize('uniform', [0.1, 0.5, 1.0])
def test_class_weights_make_up_for_rare_colours(uniform):
    prior = np.random.default_rng(0).dirichlet(np.full(Q, 0.05))
    found = color.class_weights(jnp.float32(prior), CENTRES, uniform=uniform)
    np.testing.assert_allclose(found, o.class_weights(prior, np.float64(CENTRES), uniform), 1e-4)
    spread = np.exp(-((CENTRES[:, None] - CENTRES) ** 2).sum(-1) / 50.0)
    smooth = (spread / spread.sum(0)) @ prior
    assert smooth.sum() == pytest.approx(1)
    assert (smooth * found).sum() == pytest.approx(1, abs=1e-5)
    order = np.asarray(found)[np.argsort(smooth)]
    assert (np.diff(order) <= 1e-6).all()
    if uniform == 1:
        np.testing.assert_allclose(found, 1, atol=1e-5)


def test_annealed_means():
    logits = np.random.default_rng(0).normal(size=(5, Q)).astype(np.float32)
    share = np.exp(np.float64(logits))
    mean = share @ CENTRES / share.sum(1, keepdims=True)
    np.testing.assert_allclose(color.annealed_mean(logits, CENTRES, 1.0), mean, atol=1e-3)
    mode = CENTRES[logits.argmax(1)]
    np.testing.assert_allclose(color.annealed_mean(logits, CENTRES, 1e-3), mode, atol=1e-3)
    share = share ** (1 / 0.38)
    wanted = share @ CENTRES / share.sum(1, keepdims=True)
    np.testing.assert_allclose(color.annealed_mean(logits, CENTRES, 0.38), wanted, atol=1e-3)


def oracle_loss(head, maps, extra, lab_BVHW3, uniform):
    """Eq. 2 to 4, from the encoder's map on; the head is the one of `Places` on a map of 2 x 2."""
    ab = np.asarray(lab_BVHW3)[:, 0, 2::4, 2::4, 1:]
    target = o.soft_encoding(ab, np.float64(CENTRES), 5)
    weight = o.class_weights(extra['prior'], np.float64(CENTRES), uniform)[target.argmax(-1)]
    counts = (np.abs(ab) > 5).any((1, 2, 3))
    error = -(target * jax.nn.log_softmax(o.places(head, maps))).sum(-1)
    return (weight * error)[counts].mean()


@pytest.mark.parametrize('uniform', [0.5, 1.0])
def test_loss_and_gradients_are_the_paper_s(uniform):
    """In float64, of the head and of the encoder's map, which is what the encoder learns from."""
    m = method(uniform=uniform)
    params, extra = started(m)
    given = batch(3, grey=(1, 4))
    module = build('models', MODELS['vit'], 'test')

    def maps(p):
        (_, named), _ = models.apply(module, p, {}, given['views'][:, 0, ..., :1], True)
        return named['patches'].reshape(B, 2, 2, -1)

    step = jax.jit(jax.value_and_grad(m.loss, has_aux=True))
    (value, aux), gradients = step(params, extra, given, jax.random.key(0), jnp.float32(0))
    x = jax.jit(maps)(params['encoder']['L'])
    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        wide = jax.tree.map(np.float64, (params['colours'], x))
        take = jax.value_and_grad(
            lambda head, x: oracle_loss(head, x, extra, given['lab'], uniform), (0, 1)
        )
        want, (of_head, of_map) = jax.jit(take)(*wide)
    assert np.isclose(value, want, rtol=1e-5)
    assert aux.metrics['grey'] == 0.25
    of_encoder = jax.jit(lambda p, d: jax.vjp(maps, p)[1](d)[0])(
        params['encoder']['L'], np.float32(of_map)
    )
    ours = {'head': gradients['colours'], 'encoder': gradients['encoder']['L']}
    theirs = {'head': of_head, 'encoder': of_encoder}
    for (path, g), w in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        w = np.asarray(w)
        assert np.abs(g - w).max() <= 5e-5 * max(np.abs(w).max(), 1e-2), path


class TestGrey:
    def test_a_grey_image_s_colours_count_for_nothing(self):
        """Neither in the loss nor in the prior: it is the same if its places are any other grey."""
        m = method()
        params, extra = started(m)
        loss = jax.jit(m.loss)
        given = batch(5, grey=(0, 3))
        pale = given['lab'].at[jnp.asarray([0, 3]), ..., 1:].set(4.9)
        args = params, extra
        one = loss(*args, given, jax.random.key(0), jnp.float32(0))
        two = loss(*args, {**given, 'lab': pale}, jax.random.key(0), jnp.float32(0))
        assert one[0] == two[0]
        np.testing.assert_array_equal(*(aux.measured['histogram'] for _, aux in (one, two)))
        vivid = given['lab'].at[0, ..., 1:].set(5.1)
        three = loss(*args, {**given, 'lab': vivid}, jax.random.key(0), jnp.float32(0))
        assert abs(three[0] - one[0]) > 1e-4
        assert (three[1].metrics['grey'], one[1].metrics['grey']) == (0.125, 0.25)

    def test_grey_batches_move_nothing(self):
        m = method()
        params, extra = started(m)
        given = batch(6, grey=range(B))
        (value, aux), gradients = jax.jit(jax.value_and_grad(m.loss, has_aux=True))(
            params, extra, given, jax.random.key(0), jnp.float32(0)
        )
        assert value == 0
        assert aux.metrics['grey'] == 1
        assert not any(np.any(g) for g in jax.tree.leaves(gradients))
        after = m.after(params, aux.extra, aux.measured, jnp.float32(0))
        np.testing.assert_array_equal(after['prior'], extra['prior'])


@pytest.mark.parametrize(('devices', 'accumulate'), [(1, 1), (8, 1), (1, 4), (8, 2)])
def test_the_prior_is_the_global_batch_s(devices, accumulate):
    """However it is cut: an average of histograms that follow one another."""
    m = method(prior_momentum=0.5)
    tx, _ = optim.make(name='sgd', learning_rate=0.1, total_steps=9, batch_size=256)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    whole, rows = parallel.replicated(mesh), parallel.rows(mesh)
    step = state.make_step(m, tx, lambda key, batch: batch, 0, 9, accumulate)
    step = jax.jit(step, in_shardings=(whole, rows), out_shardings=whole)
    wanted = np.full(Q, 1 / Q)
    with jax.set_mesh(mesh):
        s = jax.jit(state.make_init(m, tx, 0, 9), out_shardings=whole)(batch(count=1))
        for i in range(3):
            given = batch(i, count=16, grey=range(3 * i))
            s, _ = step(s, jax.device_put(given, rows))
            ab = np.float64(given['lab'])[3 * i :, 0, 2::4, 2::4, 1:].reshape(-1, 1, 2)
            place = ((ab - CENTRES) ** 2).sum(-1).argmin(1)
            wanted = 0.5 * wanted + 0.5 * np.bincount(place, minlength=Q) / len(place)
    np.testing.assert_allclose(s.extra['prior'], wanted, atol=1e-6)


def test_evaluators_have_colours_of_the_whole_image():
    m = method(temperature=0.38)
    params, extra = started(m)
    x = batch(7)['views'][:, 0]
    found = jax.jit(m.encode)(params, extra, {'image': x})
    assert found['ab'].shape == (B, SIDE, SIDE, 2)
    assert found['features'].shape == (B, 16)
    # Whatever the true ones are.
    other = jax.jit(m.encode)(params, extra, {'image': x.at[..., 1:].set(0.3)})
    np.testing.assert_array_equal(found['ab'], other['ab'])


def test_the_share_of_places_whose_bin_is_found():
    m = method()
    params, extra = started(m)
    # A head that says one bin of all places.
    params['colours']['out'] = {
        'kernel': np.zeros((6, Q), np.float32),
        'bias': 9 * np.float32((CENTRES == [20, -30]).all(1)),
    }
    x = np.zeros((2, 8, 8, 3), np.float32)
    x[0, :, :4, 1:] = np.asarray([22, -33]) / 50
    found = jax.jit(m.task.score)(params, extra, {'image': jnp.asarray(x)}, jax.random.key(0))
    np.testing.assert_array_equal(found['accuracy'], [0.5, 0])


class TestSizes:
    """Of the map, of the places and of the image."""

    def convolutions(self, spec, stride, side=16):
        """Those of the head, which gives colours to every pixel."""
        m = method({**VIT, 'encoder': spec}, stride=stride)
        x = jnp.zeros((2, 1, side, side, 3))
        given = {'views': x, 'lab': x}

        def run():
            params, extra = m.init(jax.random.key(0), given, 9)
            m.loss(params, extra, given, jax.random.key(0), jnp.float32(0))
            return params['colours'], m.encode(params, extra, {'image': x[:, 0]})['ab']

        head, ab = jax.eval_shape(run)
        assert ab.shape == (2, side, side, 2)
        return sum(name.startswith('conv') for name in head)

    def test_a_coarse_map_is_doubled(self):
        resnet = {**MODELS['resnet'], 'stem': 'patch'}  # 8 pixels a place
        assert self.convolutions(resnet, 4) == 2
        assert self.convolutions(resnet, 2) == 3
        assert self.convolutions(resnet, 0) == 1

    def test_a_fine_map_stays(self):
        assert self.convolutions(MODELS['vit'], 4) == 1
        assert self.convolutions(MODELS['vit'], 8) == 1
        assert self.convolutions(MODELS['vit'], 1) == 3

    def test_other_strides_are_explained(self):
        with pytest.raises(UserError, match=r'stride: got 3; colorization expects that of the map'):
            self.convolutions(MODELS['vit'], 3)


@pytest.mark.parametrize(
    ('name', 'sees', 'said'),
    [
        ('colorization', ('Lab',), r"got sees=\('Lab',\); colorization expects .*sees=\('L',\)"),
        ('colorization', ('L', 'ab'), r"got sees=\('L', 'ab'\); colorization"),
        ('split_brain', ('Lab',), r"got sees=\('Lab',\); split_brain expects .* or \('ab',\)"),
    ],
)
def test_an_encoder_that_sees_the_answer_is_refused(name, sees, said):
    with pytest.raises(UserError, match=said):
        method({**VIT, 'sees': sees}, name)


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="got a ViT; colorization expects the model 'lab'"):
        method(MODELS['vit'])
    with pytest.raises(UserError, match=r'uniform: got 0; colorization expects'):
        method(uniform=0)
    with pytest.raises(UserError, match=r'levels: got 1; split_brain expects'):
        method({**VIT, 'sees': ('L', 'ab')}, 'split_brain', levels=1)
    m = method()
    params, extra = started(m)
    with pytest.raises(KeyError, match='lab'):  # which `experiment` explains: other inputs
        m.loss(params, extra, {'views': batch()['views']}, jax.random.key(0), jnp.float32(0))


class TestSplitBrain:
    def trained_parts(self, *sees):
        m = method({**VIT, 'sees': sees}, 'split_brain')
        params, extra = jax.jit(m.init, static_argnums=2)(jax.random.key(0), batch(), 10)
        loss = jax.value_and_grad(m.loss, has_aux=True)
        given = batch(2), jax.random.key(0), jnp.float32(0)
        (value, aux), gradients = jax.jit(loss)(params, extra, *given)
        return value, aux, gradients

    def test_halves_share_nothing_and_controls_are_one_of_them(self):
        value, aux, _ = self.trained_parts('L', 'ab')
        np.testing.assert_allclose(value, aux.metrics['loss_ab'] + aux.metrics['loss_L'], rtol=1e-6)
        for sees, says in (('L', 'ab'), ('ab', 'L')):
            value, aux, gradients = self.trained_parts(sees)
            assert set(gradients) == {'encoder', f'head_{says}'}
            assert set(gradients['encoder']) == {sees}
            assert value == aux.metrics[f'loss_{says}']
            assert aux.metrics['accuracy'] == aux.metrics[f'accuracy_{says}']

    def test_each_half_learns_from_its_own_head(self):
        m = method({**VIT, 'sees': ('L', 'ab')}, 'split_brain')
        params, extra = jax.jit(m.init, static_argnums=2)(jax.random.key(0), batch(), 10)

        def loss(params, name):
            args = batch(2), jax.random.key(0), jnp.float32(0)
            return m.loss(params, extra, *args)[1].metrics[f'loss_{name}']

        for says, sees in (('ab', 'L'), ('L', 'ab')):
            gradients = jax.jit(jax.grad(loss), static_argnums=1)(params, says)
            for part in ('L', 'ab'):
                some = any(np.any(g) for g in jax.tree.leaves(gradients['encoder'][part]))
                assert some == (part == sees)
