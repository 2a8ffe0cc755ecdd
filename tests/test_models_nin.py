"""Network in Network: size, shapes, formulas, gradients, layers, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import apply, convolution, count, drawn, gradients, images, leaves, output_shapes

from contrastive_jax import models, parameters
from contrastive_jax.config import UserError
from contrastive_jax.models import nin

SMALL = {'blocks': 3, 'widths': (5, 4, 3), 'width': 6}


def test_size_and_shapes():
    """Kernels of 5·5·3·192 + 192·160 + 160·96 + 5·5·96·192 + …, and two numbers a BatchNorm."""
    kernels = 75 * 192 + 192 * 160 + 160 * 96 + 25 * 96 * 192 + 2 * 9 * 192**2 + 6 * 192**2
    norms = 2 * (192 + 160 + 96 + 9 * 192)
    assert count(nin.make(), 1, 32, 32, 3) == kernels + norms
    assert output_shapes(nin.make(), 2, 32, 32, 3) == ((2, 192), {'map': (2, 8, 8, 192)})


@pytest.mark.parametrize('train', [True, False])
def test_it_is_the_authors(train):
    """Against loops in float64; averages are over all nine places of a window, as in torch 0.2."""
    module, x = nin.make(**SMALL), images(2, 10, 8, 3)
    params, stats = drawn(module, x)
    (features, named), _ = apply(module, params, stats, x, train)
    p, s = jax.tree.map(lambda v: np.asarray(v, np.float64), (params, stats))

    def pooled(y, how):
        y = np.pad(y, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf if how is np.max else 0)
        places = [range(0, n - 2, 2) for n in y.shape[:2]]
        return np.array([
            [how(y[i : i + 3, j : j + 3], axis=(0, 1)) for j in places[1]] for i in places[0]
        ])  # fmt: skip

    y, maps = np.asarray(x, np.float64), []
    for block, (side, pool) in enumerate(((5, np.max), (5, np.mean), (3, None)), 1):
        of, averages = p[f'block{block}'], s[f'block{block}']
        for i, size in ((1, side), (2, 1), (3, 1)):
            kernel = of[f'conv{i}']['kernel']
            assert kernel.shape[:2] == (size, size)
            y = np.stack([convolution(image, kernel, 1, size // 2) for image in y])
            mean, var = averages[f'norm{i}']['mean'], averages[f'norm{i}']['var']
            if train:
                mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
            y = (y - mean) / np.sqrt(var + 1e-5) * of[f'norm{i}']['scale'] + of[f'norm{i}']['bias']
            y = np.maximum(y, 0)
        y = np.stack([pooled(image, pool) for image in y]) if pool else y
        maps.append(y)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(named['map'], y)
    close(features, y.mean((1, 2)))
    assert named.keys() == ({'map'} if train else {'map', 'block1', 'block2'})
    for i in (1, 2):
        if not train:
            close(named[f'block{i}'], maps[i - 1])


def test_gradients_reach_every_parameter_and_remat_keeps_them():
    module, x = nin.make(**SMALL), images(4, 8, 8, 3)
    params, stats = drawn(module, x)
    (value, _), grads = gradients(module)(params, stats, x)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for path, g in leaves(grads):
        assert np.abs(g).max() > 1e-5 * largest, path
    (again, _), others = gradients(module.clone(remat=True))(params, stats, x)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest)
    jax.tree.map(close, others, grads)


def test_its_blocks_are_layers():
    params, _ = jax.eval_shape(
        partial(models.init, nin.make(**SMALL)), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )
    factors = parameters.rate_factors(params, layer_decay=0.5)
    for i in (1, 2, 3):
        assert set(jax.tree.leaves(factors[f'block{i}'])) == {0.5 ** (4 - i)}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'blocks': 1}, r'model\.blocks: got 1; expected a whole number of at least 2'),
        ({'widths': (8, 8)}, r'model\.widths: got \(8, 8\); expected three'),
        ({'widths': (8, 0, 8)}, r'model\.widths\[1\]: got 0'),
        ({'dtype': 'float16'}, "unknown dtype 'float16'"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(UserError, match=message):
        nin.make(**options)
