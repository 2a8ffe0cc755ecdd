"""One contract that every file in methods/ keeps."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import checkpoint, methods, optim, parallel, state
from contrastive_jax.config import UserError, build

NAMES = [m.name for m in pkgutil.iter_modules(methods.__path__)]
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
B, SIDE = 16, 8


def make(name, model='vit', **options):
    return build(
        'methods', {'name': name, **options}, 'test', build('models', MODELS[model], 'test')
    )


def batch(seed=0):
    """Images of four classes that differ in their pattern, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, B).astype(np.int32)
    patterns = np.random.default_rng(7).normal(size=(4, 1, SIDE, SIDE, 3))
    views = patterns[label] + 0.5 * rng.normal(size=(B, 2, SIDE, SIDE, 3))
    return {
        'views': views.astype(np.float32),
        'label': label,
        'index': np.arange(B, dtype=np.int32),
    }


def trainer(name, model, mesh, rate=1e-2, accumulate=1):
    method = make(name, model)
    tx, _ = optim.make(name='adamw', learning_rate=rate, total_steps=50, batch_size=256)
    example = {k: v[:1] for k, v in batch().items()}
    whole = parallel.replicated(mesh)
    init = jax.jit(lambda: state.make_init(method, tx, seed=3)(example), out_shardings=whole)
    step = state.make_step(method, tx, lambda key, views: views, seed=3, accumulate=accumulate)
    return init, jax.jit(step, in_shardings=(whole, parallel.rows(mesh)), out_shardings=whole)


def same_structure(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def equal_bits(a, b):
    same_structure(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('name', NAMES)
class TestContract:
    def test_abstract_init_and_step_keep_the_state_s_structure(self, name, model):
        mesh = parallel.make_mesh(jax.devices()[:1])
        with jax.set_mesh(mesh):
            init, step = trainer(name, model, mesh)
            before = jax.eval_shape(init)
            after, metrics = jax.eval_shape(step, before, batch())
        same_structure(before, after)
        assert metrics['loss'].shape == ()
        assert metrics['loss'].dtype == jnp.float32

    def test_loss_and_gradients_are_finite_and_nothing_is_dead(self, name, model):
        method = make(name, model)
        example = {k: jnp.asarray(v) for k, v in batch().items()}
        params, extra = method.init(jax.random.key(0), example)
        (loss, (_, metrics)), grads = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(
            params, extra, example, jax.random.key(1), jnp.zeros((), jnp.int32)
        )
        assert np.isfinite(loss)
        assert all(np.isfinite(m) for m in metrics.values())
        for path, g in jax.tree.leaves_with_path(grads):
            assert np.isfinite(g).all(), path
            assert np.abs(g).max() > 0, f'{path} gets no gradient'

    def test_eight_devices_equal_one(self, name, model):
        losses = []
        for mesh in (parallel.make_mesh(jax.devices()[:1]), parallel.make_mesh()):
            with jax.set_mesh(mesh):
                init, step = trainer(name, model, mesh)
                s, run = init(), []
                for i in range(3):
                    s, metrics = step(s, parallel.shard_batch(mesh, batch(i)))
                    run.append(float(metrics['loss']))
            losses.append(run)
        assert np.allclose(losses[0], losses[1], rtol=1e-5, atol=0)

    def test_saved_and_restored_goes_on_with_the_same_bits(self, name, model, tmp_path):
        mesh = parallel.make_mesh()
        with jax.set_mesh(mesh):
            init, step = trainer(name, model, mesh)
            s, _ = step(init(), parallel.shard_batch(mesh, batch(0)))
            checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best='none')
            checkpoints.save(s, None, 1)
            s, metrics = step(s, parallel.shard_batch(mesh, batch(1)))
            checkpoints.wait()
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=parallel.replicated(mesh)
                ),
                jax.eval_shape(init),
            )
            restored = checkpoints.restore(like)
            again, metrics_again = step(restored, parallel.shard_batch(mesh, batch(1)))
            checkpoints.close()
        equal_bits((s, metrics), (again, metrics_again))

    def test_encode_gives_features(self, name, model):
        method = make(name, model)
        example = {k: jnp.asarray(v) for k, v in batch().items()}
        params, extra = method.init(jax.random.key(0), example)
        out = method.encode(params, extra, {'image': example['views'][:, 0]})
        assert out['features'].shape == (B, 16)
        assert out['features'].dtype == jnp.float32

    def test_loss_falls(self, name, model):
        mesh = parallel.make_mesh(jax.devices()[:1])
        with jax.set_mesh(mesh):
            init, step = trainer(name, model, mesh)
            s, run = init(), []
            for i in range(40):
                s, metrics = step(s, batch(i))
                run.append(float(metrics['loss']))
        assert np.mean(run[-5:]) < 0.9 * np.mean(run[:5])


@pytest.mark.parametrize('name', NAMES)
def test_unknown_keyword_names_the_closest(name):
    with pytest.raises(UserError, match=r"unknown key 'nonesuch'.*Exists"):
        make(name, nonesuch=1)


@pytest.mark.parametrize('name', NAMES)
def test_the_file_says_its_paper(name):
    text = importlib.import_module(f'contrastive_jax.methods.{name}').__doc__
    assert 'http' in text


def test_accumulation_averages_the_micro_batches_gradients():
    """Two micro-batches of rows 0, 2, 4... and 1, 3, 5...: the mean of their losses' gradients."""
    mesh = parallel.make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        init, step = trainer('simclr', 'vit', mesh, accumulate=2)
        s = init()
        _, metrics = step(s, batch())
        method = make('simclr')
        losses = []
        extra = s.extra
        grads = []
        for part in (0, 1):
            rows = {k: v[part::2] for k, v in batch().items()}
            (loss, (extra, _)), g = jax.value_and_grad(method.loss, has_aux=True)(
                s.params, extra, rows, jax.random.key(0), 0
            )
            losses.append(float(loss))
            grads.append(g)
    assert np.isclose(metrics['loss'], np.mean(losses), rtol=1e-5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(mean)))
    assert np.isclose(metrics['grad_norm'], norm, rtol=1e-4)
