"""One contract that every file in methods/ keeps."""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from contrastive_jax import experiment, losses, methods, models, optim, parallel, state
from contrastive_jax.augment.lab import unscaled
from contrastive_jax.augment.masking import block_mask
from contrastive_jax.config import UserError, build
from contrastive_jax.networks import pair
from contrastive_jax.planning import hlo
from contrastive_jax.workdir import checkpoint

NAMES = [m.name for m in pkgutil.iter_modules(methods.__path__)]
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
MODELS = {
    'vit': {'name': 'vit', 'width': 16, 'depth': 1, 'heads': 2, 'patch': 4},
    'resnet': {
        'name': 'resnet',
        'stem': 'patch4',
        'widths': (8, 16),
        'blocks': (1, 1),
        'zero_init_last': False,  # so that no gradient is zero in the first step
    },
}
NEEDS_TOKENS = {'dinov2', 'mae', 'ijepa'}
# Of the four patches two are hidden, and what is behind leaves most of the work to the encoder.
SMALLER = {
    'mae': {'width': 16, 'depth': 1, 'mask_ratio': 0.5},
    'ijepa': {'width': 16, 'depth': 1, 'blocks': 2, 'momentum': 0.9},
}
WITH = {'ijepa': {'pool': 'mean'}}  # of the ViT
LEARNS_AT = {'mae': 1.0, 'context_encoder': 1.0, 'ijepa': 1.0}  # the rate of SGD, but 0.1
# Heads have BatchNorm in every case; the encoder too where a target's or a query's statistics are
# kept in different ways.
CASES = [(n, 'vit') for n in NAMES] + [(n, 'resnet') for n in ('simclr', 'moco', 'byol')]
B, SIDE, RECORDS = 16, 8, 100


@functools.cache
def small(name):
    """The embedded preset of the method's config."""
    path = min(CONFIGS.glob(f'{name}*.py'), key=lambda p: len(p.stem))
    return runpy.run_path(str(path))['get_config']('digits')


@functools.cache
def make(name, model='vit', **options):
    config = small(name)
    spec = {**MODELS[model], **(WITH.get(name, {}) if model == 'vit' else {})}
    if config.model.name == 'lab':  # parts that are 16 wide together
        sees = config.model.sees
        spec = {'name': 'lab', 'sees': sees, 'encoder': {**spec, 'width': 16 // len(sees)}}
    model = build('models', spec, 'test')
    if config.text:
        spec = {'name': 'transformer', 'width': 16, 'depth': 1, 'heads': 2}
        options['text'] = build('models', spec, 'test', vocabulary=9, length=6)
    options = {**config.method.to_dict(), **SMALLER.get(name, {}), **options}
    return build('methods', options, 'test', model)


def batch_of(name, seed=0):
    """With as many views as the method's config says."""
    found, inputs = batch(seed), small(name).inputs
    if 'grid' in inputs:
        return {**found, 'views': tiles(found['label'], inputs.grid**2, seed)}
    views = found['views'][:, : inputs.views]
    more = {'lab': np.asarray(unscaled(views))} if inputs.name == 'lab' else {}
    return {**found, 'views': views, **more}


def tiles(label, count, seed):
    """As many tiles, which differ in a pattern of their place and one of the class."""
    rng = np.random.default_rng(seed)
    places = np.random.default_rng(8).normal(size=(1, count, SIDE, SIDE, 3))
    patterns = np.random.default_rng(7).normal(size=(4, 1, SIDE, SIDE, 3))
    noise = rng.normal(size=(B, count, SIDE, SIDE, 3))
    return (places + 0.3 * patterns[label] + 0.5 * noise).astype(np.float32)


def batch(seed=0):
    """Images of four classes that differ in their pattern, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, B).astype(np.int32)
    patterns = np.random.default_rng(7).normal(size=(4, 1, SIDE, SIDE, 3))
    views = patterns[label] + 0.5 * rng.normal(size=(B, 2, SIDE, SIDE, 3))
    # The label's token between others, and padding behind.
    text = rng.integers(4, 9, (B, 6))
    text[:, 2], text[np.arange(6) >= rng.integers(3, 7, (B, 1))] = label, -1
    return {
        'views': views.astype(np.float32),
        'local_views': views[:, :, :4, :4].astype(np.float32),
        'text': text.astype(np.int32),
        'label': label,
        'index': np.arange(B, dtype=np.int32),
    }


@functools.cache
def initial(name, model, rate, **options):
    """(method, optimiser, state); by SGD, because Adam makes steps of what is rounding alone."""
    method = make(name, model, **options)
    tx, _ = optim.make(
        name='sgd', learning_rate=rate, clip_norm=1.0, total_steps=50, batch_size=256
    )
    example = {k: v[:1] for k, v in batch_of(name).items()}
    start = jax.jit(state.make_init(method, tx, seed=3, records=RECORDS))(example)
    return method, tx, start


@functools.cache  # one compilation for all tests of a case
def trainer(name, model, devices, rate=0.1, accumulate=1, **options):
    """(mesh, init, step) of a method."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    whole = parallel.replicated(mesh)
    method, tx, start = initial(name, model, rate, **options)
    step = state.make_step(
        method, tx, lambda key, batch: batch, seed=3, total_steps=50, accumulate=accumulate
    )
    step = jax.jit(step, in_shardings=(whole, parallel.rows(mesh)), out_shardings=whole)
    return mesh, lambda: jax.device_put(start, whole), step


def same_structure(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def equal_bits(a, b):
    same_structure(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(('name', 'model'), CASES)
class TestContract:
    def test_a_step_keeps_the_state_s_structure(self, name, model):
        mesh, init, step = trainer(name, model, 1)
        with jax.set_mesh(mesh):
            before = jax.eval_shape(init)
            after, metrics = jax.eval_shape(step, before, batch_of(name))
        same_structure(before, after)
        assert metrics['loss'].shape == ()
        assert metrics['loss'].dtype == jnp.float32

    def test_eight_devices_equal_one_and_no_parameter_is_dead(self, name, model):
        losses = []
        for devices in (1, 8):
            mesh, init, step = trainer(name, model, devices)
            with jax.set_mesh(mesh):
                s, run = init(), []
                for i in range(3):
                    s, metrics = step(s, parallel.shard_batch(mesh, batch_of(name, i)))
                    assert all(np.isfinite(m) for m in metrics.values())
                    run.append(float(metrics['loss']))
            losses.append(run)
            # momentum: the sum of the gradients
            for path, total in jax.tree.leaves_with_path(optax.tree.get(s.opt, 'trace')):
                assert np.isfinite(total).all(), path
                assert np.abs(total).max() > 0, f'{path} gets no gradient'
        assert np.allclose(losses[0], losses[1], rtol=1e-5, atol=1e-6)

    def test_eight_devices_start_collectives_in_one_order(self, name, model):
        """XLA hangs on such a step on CPUs: docs/troubleshooting.md."""
        mesh, init, step = trainer(name, model, 8)
        with jax.set_mesh(mesh):
            rows = parallel.shard_batch(mesh, batch_of(name))
            assert not hlo.overtaking(step.lower(init(), rows).compile().as_text())

    def test_saved_and_restored_goes_on_with_the_same_bits(self, name, model, tmp_path):
        mesh, init, step = trainer(name, model, 8)
        with jax.set_mesh(mesh):
            s, _ = step(init(), parallel.shard_batch(mesh, batch_of(name, 0)))
            checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best='none')
            checkpoints.save(s, None, 1)
            s, metrics = step(s, parallel.shard_batch(mesh, batch_of(name, 1)))
            checkpoints.wait()
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=parallel.replicated(mesh)
                ),
                jax.eval_shape(init),
            )
            restored = checkpoints.restore(like)
            again, metrics_again = step(restored, parallel.shard_batch(mesh, batch_of(name, 1)))
            checkpoints.close()
        equal_bits((s, metrics), (again, metrics_again))

    def test_encode_gives_features(self, name, model):
        method = make(name, model)
        example = {k: jnp.asarray(v) for k, v in batch_of(name).items()}

        def run():
            params, extra = method.init(jax.random.key(0), example, RECORDS)
            return method.encode(params, extra, {'image': example['views'][:, 0]})

        features = jax.eval_shape(run)['features']
        assert features.shape == (B, 16)
        assert features.dtype == jnp.float32

    def test_it_learns(self, name, model):
        """Features say more of the pattern than those of the untrained encoder do.

        Not the loss: a target that moves and a queue that fills may let it rise. Of a method that
        asks something of single records, held-out ones answer it more often than at first.
        """
        mesh, init, step = trainer(name, model, 1, rate=LEARNS_AT.get(name, 0.1))
        method = make(name, model)
        encode = jax.jit(method.encode)

        def separation(s):
            """Variance between patterns over that within them."""
            test = batch(1000)
            x = encode(s.params, s.extra, {'image': test['views'][:, 0]})['features']
            means = np.stack([x[test['label'] == c].mean(0) for c in test['label']])
            return np.var(means, axis=0).sum() / np.var(x - means, axis=0).sum()

        def answered(s):
            """Share of right answers."""
            test = batch_of(name, 1000)
            asked = (
                {'views': test['views']}
                if 'grid' in small(name).inputs
                else {'image': test['views'][:, 0]}
            )
            found = jax.jit(method.task.score)(s.params, s.extra, asked, jax.random.key(0))
            assert set(found) == set(method.task.units)
            return found['accuracy'].mean()

        measure = answered if method.task else separation
        with jax.set_mesh(mesh):
            s = init()
            before = measure(s)
            for i in range(40):
                s, _ = step(s, batch_of(name, i))
            assert measure(s) > 1.5 * before


@pytest.mark.parametrize('name', NAMES)
def test_unknown_keyword_names_the_closest(name):
    with pytest.raises(UserError, match=r"unknown key 'nonesuch'.*Exists"):
        make(name, nonesuch=1)


def options_of(name):
    return inspect.signature(importlib.import_module(f'contrastive_jax.methods.{name}').make)


@pytest.mark.parametrize(
    ('name', 'key', 'value', 'expected'),
    [
        (name, *rest)
        for rest in (
            ('temperature', 0.0, 'above 0'),
            ('teacher_temperature', (0.0, 0.1), 'above 0'),
            ('momentum', 1.5, 'from 0 to 1'),
            ('centre_momentum', -0.1, 'from 0 to 1'),
            ('queue_from', 1.1, 'from 0 to 1'),
            ('queue', 0.5, 'a whole number of at least'),
        )
        for name in NAMES
        if rest[0] in options_of(name).parameters
    ],
)
def test_numbers_out_of_range_are_explained(name, key, value, expected):
    with pytest.raises(UserError, match=rf'method\.{key}: got .*; {name} expects .*{expected}'):
        make(name, **{key: value})


@pytest.mark.parametrize('name', NAMES)
def test_the_file_says_its_paper(name):
    text = importlib.import_module(f'contrastive_jax.methods.{name}').__doc__
    assert 'http' in text


def close(a, b, rtol=1e-5, atol=1e-6):
    same_structure(a, b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.allclose(x, y, rtol, atol), path


def test_accumulation_averages_the_micro_batches_gradients():
    """Two micro-batches of rows 0, 2, 4... and 1, 3, 5...: the mean of their losses' gradients."""
    mesh, init, step = trainer('simclr', 'vit', 1, accumulate=2)
    with jax.set_mesh(mesh):
        s = init()
        after, metrics = step(s, batch())
        method = make('simclr')
        losses = []
        extra = s.extra
        grads = []
        gradient = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
        for part in (0, 1):
            rows = {k: v[part::2] for k, v in batch().items()}
            (loss, aux), g = gradient(s.params, extra, rows, jax.random.key(0), jnp.float32(0))
            extra = aux.extra
            losses.append(float(loss))
            grads.append(g)
    assert np.isclose(metrics['loss'], np.mean(losses), rtol=1e-5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(mean)))
    assert np.isclose(metrics['grad_norm'], norm, rtol=1e-4)
    close(after.extra, extra)  # BatchNorm's averages went from one to the next


def of_batch_norm(path):
    return any(str(getattr(entry, 'key', '')).endswith('stats') for entry in path)


@pytest.mark.parametrize('name', NAMES)
def test_a_loss_moves_the_averages_of_batch_norm_and_nothing_else(name):
    """The rest of `extra` belongs to the step, of whose micro-batches there may be several."""
    method, _, start = initial(name, 'vit', 0.1)
    traced, (_, aux) = jax.make_jaxpr(method.loss, return_shape=True)(
        start.params, start.extra, batch_of(name), jax.random.key(0), jnp.float32(0)
    )
    same_structure(aux.extra, start.extra)
    before = traced.jaxpr.invars[len(jax.tree.leaves(start.params)) :]
    after = traced.jaxpr.outvars[1:]
    for (path, _), a, b in zip(jax.tree.leaves_with_path(aux.extra), before, after, strict=False):
        assert a is b or of_batch_norm(path), path


@pytest.mark.parametrize('name', NAMES)
def test_what_belongs_to_the_step_moves_once_a_step(name):
    """A step of four micro-batches moves averages four times, a queue, a centre, a target once."""
    method, _, start = initial(name, 'vit', 0.1)
    if all(of_batch_norm(path) for path, _ in jax.tree.leaves_with_path(start.extra)):
        pytest.skip('nothing belongs to the step')
    # The micro-batches, rows 0, 4, 8..., 1, 5, 9..., ..., hold the same images in other orders, so
    # that BatchNorm normalises each of them and the whole alike.
    order = np.stack([np.random.default_rng(i).permutation(B // 4) for i in range(4)], 1)
    whole = {k: v[order.reshape(B)] for k, v in batch_of(name).items()}
    mesh, init, step = trainer(name, 'vit', 1, accumulate=4)
    loss = jax.jit(method.loss)
    _, keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))  # as the step draws them
    with jax.set_mesh(mesh):
        s, _ = step(init(), whole)
        extra, found = start.extra, []
        for i, key in enumerate(jax.random.split(keys, 4)):
            part = {k: v[i::4] for k, v in whole.items()}
            _, aux = loss(start.params, extra, part, key, jnp.float32(0))
            extra = aux.extra
            found.append(aux.measured)
        _, at_once = loss(start.params, start.extra, whole, keys, jnp.float32(0))

        def joined(*parts):
            out = np.empty((4 * len(parts[0]), *parts[0].shape[1:]), parts[0].dtype)
            for i, part in enumerate(parts):
                out[i::4] = part
            return out

        rows = jax.tree.map(joined, *found)
        close(s.extra, method.after(s.params, extra, rows, jnp.float32(0)))
    for x, y in zip(jax.tree.leaves(rows), jax.tree.leaves(at_once.measured), strict=True):
        assert len(y) in (1, B)
        assert np.allclose(x if len(y) == B else x.mean(0)[None], y, 1e-4, 1e-5)


@pytest.mark.parametrize(('name', 'key'), [('dino', 'centre'), ('moco', 'queue'), ('pcl', 'queue')])
def test_micro_batches_leave_what_the_whole_batch_does(name, key):
    """Where what is remembered of an image depends on no other image: no BatchNorm on its way."""
    found = []
    for accumulate in (1, 4):
        mesh, init, step = trainer(name, 'vit', 1, accumulate=accumulate)
        with jax.set_mesh(mesh):
            before = init()
            s, _ = step(before, batch_of(name))
        found.append(s.extra[key])
        assert np.abs(found[-1] - before.extra[key]).max() > 1e-3
    assert np.allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', sorted(NEEDS_TOKENS))
def test_an_encoder_without_tokens_is_refused(name):
    example = {k: jnp.asarray(v) for k, v in batch().items()}
    with pytest.raises(UserError, match=r'config\.model.*cls'):
        make(name, 'resnet').init(jax.random.key(0), example, RECORDS)


@pytest.mark.parametrize('name', NAMES)
def test_refresh_keeps_the_state_s_structure_on_any_number_of_devices(name):
    """The embeddings' rows are sharded and padded; the first record is unusable."""
    method = make(name)
    if method.refresh is None:
        pytest.skip('nothing happens between epochs')
    example = {k: jnp.asarray(v) for k, v in batch().items()}
    _, _, start = initial(name, 'vit', 0.1)
    extra = start.extra
    features = jax.jit(method.refresh.embed)(start.params, extra, {'image': example['views'][:, 0]})
    assert np.allclose(np.linalg.norm(features['features'], axis=1), 1, atol=1e-5)
    rng = np.random.default_rng(0)
    D = features['features'].shape[1]
    x = np.zeros((104, D), np.float32)
    x[1:RECORDS] = rng.normal(size=(RECORDS - 1, D)) / np.sqrt(D)
    found = []
    for mesh in (parallel.make_mesh(jax.devices()[:1]), parallel.make_mesh()):
        with jax.set_mesh(mesh):
            z = jax.device_put(x, parallel.rows(mesh))
            update = jax.jit(method.refresh.update)
            early = update(extra, z, jax.random.key(1), jnp.float32(0))
            late = update(extra, z, jax.random.key(1), jnp.float32(1))
        same_structure(extra, late)
        equal_bits(extra, early)
        found.append(late)
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.allclose(one, eight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', [n for n in NAMES if small(n).text])
class TestText:
    def test_images_and_texts_share_a_space(self, name):
        method, _, start = initial(name, 'vit', 0.1)
        tx, _ = optim.make(name='adamw', learning_rate=0.01, total_steps=60, batch_size=256)
        step = jax.jit(state.make_step(method, tx, lambda key, batch: batch, 3, 60))
        encode = jax.jit(method.encode)
        with jax.set_mesh(parallel.make_mesh(jax.devices()[:1])):
            s = start._replace(opt=tx.init(start.params))
            for i in range(60):
                s, _ = step(s, batch_of(name, i))
            test = batch(1000)
            images = encode(s.params, s.extra, {'image': test['views'][:, 0]})['embedding']
            texts = encode(s.params, s.extra, {'text': test['text']})
        assert set(texts) == {'embedding'}
        cosines = losses.unit(images) @ losses.unit(texts['embedding']).T
        same = test['label'][:, None] == test['label'][None, :]
        assert cosines[same].mean() > cosines[~same].mean() + 0.2

    @pytest.mark.parametrize('same_text', ['mask', 'positive'])
    def test_equal_texts_are_no_negatives_on_any_number_of_devices(self, name, same_text):
        example = batch_of(name)
        example['text'][1::4] = example['text'][::4]
        found = []
        for devices in (1, 8):
            mesh, init, step = trainer(name, 'vit', devices, same_text=same_text)
            with jax.set_mesh(mesh):
                s, metrics = step(init(), parallel.shard_batch(mesh, example))
            found.append((metrics['loss'], s.params))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)
        mesh, init, step = trainer(name, 'vit', 1)
        with jax.set_mesh(mesh):
            _, metrics = step(init(), parallel.shard_batch(mesh, example))
        assert abs(found[0][0] - metrics['loss']) > 0.05

    def test_a_frozen_image_encoder_stays_as_it_is(self, name):
        """LiT: not a bit of it changes, and it is in no optimiser's state."""
        mesh, init, step = trainer(name, 'vit', 1, locked=True, projection=16)
        with jax.set_mesh(mesh):
            s = before = init()
            for i in range(3):
                s, _ = step(s, batch_of(name, i))
        assert 'encoder' not in s.params
        equal_bits(s.extra['frozen'], before.extra['frozen'])
        encoders = make(name, locked=True, projection=16).encoders(s.params, s.extra)
        equal_bits(encoders['image'][0], before.extra['frozen']['encoder'])

    def test_mistakes_are_explained(self, name):
        example = {k: jnp.asarray(v) for k, v in batch_of(name).items()}
        with pytest.raises(UserError, match=r'projection: got 8;.*16'):
            make(name, locked=True, projection=8).init(jax.random.key(0), example, RECORDS)
        model = build('models', MODELS['vit'], 'test')
        with pytest.raises(UserError, match=r"unknown same_text 'negatives'.*'positive'"):
            make(name, same_text='negatives')
        with pytest.raises(UserError, match="'text' is required"):
            build('methods', small(name).method.to_dict(), 'config.method', model)

    def test_micro_batches_give_the_whole_batch_s_gradients(self, name):
        whole = make(name)
        parts = models.Microbatched(build('models', MODELS['vit'], 'test'), 4)
        spec = {'name': 'transformer', 'width': 16, 'depth': 1, 'heads': 2}
        text = models.Microbatched(build('models', spec, 'test', vocabulary=9, length=6), 4)
        config = small(name).method.to_dict()
        cut = build('methods', config, 'test', parts, text=text)
        example = {k: jnp.asarray(v) for k, v in batch_of(name).items()}
        _, _, start = initial(name, 'vit', 0.1)
        both = [
            jax.jit(jax.grad(method.loss, has_aux=True))(
                start.params, start.extra, example, jax.random.key(0), jnp.float32(0)
            )[0]
            for method in (whole, cut)
        ]
        for a, b in zip(*map(jax.tree.leaves, both), strict=True):
            assert np.allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max())


def test_siglip_whose_images_are_not_projected():
    """big_vision's towers: the space is that of the image features; the texts' layer has a bias."""
    options = {'project_images': False, 'projection': 16}
    method = make('siglip', **options)
    _, _, start = initial('siglip', 'vit', 0.1, **options)
    assert 'projection' not in start.params
    assert set(start.params['text']['projection']['linear1']) == {'kernel', 'bias'}
    example = batch_of('siglip')
    found = method.encode(start.params, start.extra, {'image': example['views'][:, 0]})
    np.testing.assert_array_equal(found['embedding'], found['features'])
    gradient, _ = jax.jit(jax.grad(method.loss, has_aux=True))(
        start.params, start.extra, example, jax.random.key(0), jnp.float32(0)
    )
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient['encoder']))
    assert 'image_projection' not in method.encoders(start.params, start.extra)
    with pytest.raises(UserError, match=r'projection: got 8;.*features, 16'):
        initial('siglip', 'vit', 0.1, project_images=False, projection=8)


def test_moco_adds_its_two_directions():
    """The authors' notebook: loss_12 + loss_21, not their mean."""
    _, _, start = initial('moco', 'vit', 0.1)
    example = batch_of('moco')
    swapped = {**example, 'views': example['views'][:, ::-1]}

    def loss(batch, **options):
        arguments = start.params, start.extra, batch, jax.random.key(0), jnp.float32(0)
        return float(make('moco', **options).loss(*arguments)[0])

    both = loss(example) + loss(swapped)
    np.testing.assert_allclose(loss(example, symmetric=True), both, rtol=1e-6)


@pytest.mark.parametrize(
    ('name', 'head', 'options'),
    [
        ('barlow_twins', 'projector', {}),
        ('vicreg', 'projector', {}),
        ('byol', 'projector', {}),
        ('byol', 'predictor', {}),
        ('moco_v3', 'predictor', {'predictor_batch_norm': False}),
    ],
)
def test_last_layers_that_have_no_bias(name, head, options):
    """In the authors' code."""
    _, _, start = initial(name, 'vit', 0.1, **options)
    last = max(key for key in start.params[head] if key.startswith('linear'))
    assert set(start.params[head][last]) == {'kernel'}


def test_a_config_s_microbatches_hold_whole_records():
    """Of two views in two parts BatchNorm sees both in each: not a view a part."""
    config = small('simclr').copy_and_resolve_references()
    with config.unlocked():
        config.update({'batch_size': B, 'microbatch': B // 2})
        config.model = MODELS['resnet']
    method = experiment.build_method(config, {})
    example = {k: jnp.asarray(v) for k, v in batch_of('simclr').items()}
    example['views'] *= jnp.asarray([0.2, 3.0]).reshape(1, 2, 1, 1, 1)
    params, extra = method.init(jax.random.key(0), example, RECORDS)
    _, aux = jax.jit(method.loss)(params, extra, example, jax.random.key(1), jnp.float32(0))
    encoder, averages = build('models', MODELS['resnet'], 'test'), extra['stats']['encoder']
    for part in range(2):
        rows = example['views'][part::2].reshape(B, SIDE, SIDE, 3)
        _, averages = models.apply(encoder, params['encoder'], averages, rows, True)
    for a, b in zip(*map(jax.tree.leaves, (aux.extra['stats']['encoder'], averages)), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_clip_s_scale_never_counts_for_more_than_its_limit_and_can_fall_again():
    def slope(x, sign):
        return jax.grad(lambda x: sign * pair.at_most(x, 1.0))(jnp.float32(x))

    assert pair.at_most(jnp.float32(3), 1.0) == 1
    assert pair.at_most(jnp.float32(0.5), 1.0) == 0.5
    assert slope(0.5, 1) == 1
    assert slope(0.5, -1) == -1
    # Descent along −gradient would go up, and must not; down it may.
    assert slope(3.0, -1) == 0
    assert slope(3.0, 1) == 1


@pytest.mark.parametrize('stop_gradient', [True, False])
def test_simsiam_without_stop_gradient_collapses(stop_gradient):
    """Figure 2 of the paper: the loss at its minimum, and outputs that are nearly one."""
    options = {'stop_gradient': stop_gradient, 'last_batch_norm': False}
    mesh, init, step = trainer('simsiam', 'vit', 1, rate=0.8, **options)
    with jax.set_mesh(mesh):
        s = init()
        for i in range(50):
            s, metrics = step(s, batch(i))
    assert (metrics['output_std'] > 0.5) == stop_gradient
    assert (metrics['loss'] > -0.99) == stop_gradient


@pytest.mark.parametrize(
    ('name', 'options'),
    [('dino', {'learn_length': True}), ('dinov2', {'centring': 'centre', 'shared_head': True})],
)
def test_published_options_are_the_same_on_eight_devices(name, options):
    found = []
    for devices in (1, 8):
        mesh, init, step = trainer(name, 'vit', devices, **options)
        with jax.set_mesh(mesh):
            s = init()
            for i in range(2):
                s, metrics = step(s, parallel.shard_batch(mesh, batch_of(name, i)))
        found.append((metrics, {k: v for k, v in s.extra.items() if 'centre' in k}))
        gradients = optax.tree.get(s.opt, 'trace')
        assert np.abs(gradients['head']['last']['length']).max() > 0
        for centre in found[-1][1].values():
            assert np.abs(centre).max() > 0
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.allclose(one, eight, rtol=1e-4, atol=1e-5)


def dino_head(params, x):
    """The head in float64, with lengths."""
    p, x = jax.tree.map(np.float64, (params, x))
    for i in (1, 2, 3):
        x = x @ p['mlp'][f'linear{i}']['kernel'] + p['mlp'][f'linear{i}']['bias']
        if i < 3:
            x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    kernel = p['last']['kernel'] / np.linalg.norm(p['last']['kernel'], axis=0)
    return x / np.linalg.norm(x, axis=-1, keepdims=True) @ kernel * p['last']['length'][0]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize('shared', [True, False])
def test_dinov2_with_centres_equals_the_authors_formulas(shared):
    """Float64 of the loss on the encoders' outputs, and of both centres after the step."""
    options = {'centring': 'centre', 'shared_head': shared, 'koleo': 0.0}
    method, _, start = initial('dinov2', 'vit', 0.1, **options)
    rng = np.random.default_rng(5)

    def shaken(tree):
        return jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), tree)

    params, target = shaken(start.params), shaken(start.extra['target'])
    assert ('patch_head' in params) == ('patch_head' in target['params']) == (not shared)
    centres = {k: np.float32(0.1 * rng.normal(size=512)) for k in ('centre', 'patch_centre')}
    extra = {**start.extra, 'target': target, **centres}
    data, key, progress = batch_of('dinov2'), jax.random.key(9), jnp.float32(0.1)
    value, aux = jax.jit(method.loss)(params, extra, data, key, progress)
    after = method.after(params, aux.extra, aux.measured, progress)

    V, side = 2, 2
    mask_key, _ = jax.random.split(key)
    mask = np.asarray(block_mask(mask_key, B * V, side, side))
    assert 0 < mask.sum() < mask.size
    model = build('models', MODELS['vit'], 'test')

    def encode(params, views, mask=None):
        x = jnp.asarray(views.reshape(-1, *views.shape[2:]))
        (_, named), _ = models.apply(model, params['encoder'], {}, x, True, mask=mask)
        return np.asarray(named['cls']), np.asarray(named['patches'])

    cls, patches = encode(params, data['views'], mask)
    local, _ = encode(params, data['local_views'])
    taught, taught_patches = encode(target['params'], data['views'])
    own = 'head' if shared else 'patch_head'
    tau = 0.04 + 0.03 / 3  # a third of the way

    def log(x):
        return np.log(softmax(x / 0.1))

    student = log(dino_head(params['head'], np.stack([cls, local]).reshape(2, B, V, -1)))
    teacher = dino_head(target['params']['head'], taught).reshape(B, V, -1)
    goal = softmax((teacher - centres['centre']) / tau)
    terms = [
        -(goal[:, g] * student[size, :, v]).sum(-1).mean()
        for g in range(V)
        for size, v in np.ndindex(2, V)
        if (size, v) != (0, g)
    ]
    want = sum(terms) / len(terms)
    seen = dino_head(target['params'][own], taught_patches)
    goal = softmax((seen - centres['patch_centre']) / tau)
    each = -(goal * log(dino_head(params[own], patches))).sum(-1)
    want += (each * mask / np.maximum(mask.sum(1, keepdims=True), 1)).sum() / (B * V)
    assert np.isclose(value, want, rtol=1e-4)

    means = {'centre': teacher.mean((0, 1)), 'patch_centre': seen[mask].mean(0)}
    for name, mean in means.items():
        want = 0.9 * centres[name] + 0.1 * mean
        assert np.allclose(after[name], want, rtol=1e-4, atol=1e-5), name
        assert np.array_equal(aux.extra[name], centres[name])


def test_swav_s_queue_fills_from_its_time_on_and_counts_when_it_is_full():
    mesh, init, step = trainer('swav', 'vit', 1, queue=2 * B, queue_from=0.09)
    loss = jax.jit(make('swav', queue=2 * B, queue_from=0.09).loss)

    def value(s, queue):
        extra = {**s.extra, 'queue': queue}
        return loss(s.params, extra, batch_of('swav'), jax.random.key(0), jnp.float32(0.5))[0]

    with jax.set_mesh(mesh):
        s = init()
        empty = s.extra['queue']
        for i in range(7):  # of 50
            s, _ = step(s, batch_of('swav', i))
            filled = np.any(s.extra['queue'] != 0, axis=(1, 2))
            assert filled.tolist() == [i >= 6] * B + [i >= 5] * B
            same = value(s, s.extra['queue']) == value(s, empty)
            assert same == (i < 6)
