"""DCGAN's convolutions: size, shapes, formulas, gradients, layers, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import apply, convolution, count, drawn, gradients, images, leaves, output_shapes

from contrastive_jax import models, parameters
from contrastive_jax.config import UserError
from contrastive_jax.models import dcgan

SMALL = {'widths': (3, 4, 5)}


def test_size_and_shapes():
    """Kernels of 4·4·3·64 + 4·4·64·64 + …, and two numbers a BatchNorm."""
    pairs = [(3, 64), (64, 64), (64, 128), (128, 256), (256, 512)]
    numbers = sum(16 * a * b for a, b in pairs) + 2 * (64 + 128 + 256 + 512)
    assert count(dcgan.make(), 1, 128, 128, 3) == numbers
    assert output_shapes(dcgan.make(), 2, 128, 128, 3) == ((2, 512), {'map': (2, 4, 4, 512)})


@pytest.mark.parametrize('train', [True, False])
def test_it_is_the_authors(train):
    """Against loops in float64."""
    module, x = dcgan.make(**SMALL), images(2, 16, 8, 3)
    params, stats = drawn(module, x)
    (features, named), _ = apply(module, params, stats, x, train)
    p, s = jax.tree.map(lambda v: np.asarray(v, np.float64), (params, stats))
    y, maps = np.asarray(x, np.float64), []
    for i in (1, 2, 3):
        of = p[f'block{i}']
        y = np.stack([convolution(image, of['kernel'], 2, 1) for image in y])
        if i > 1:
            mean, var = s[f'block{i}']['norm']['mean'], s[f'block{i}']['norm']['var']
            if train:
                mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
            y = (y - mean) / np.sqrt(var + 1e-5) * of['norm']['scale'] + of['norm']['bias']
        y = np.where(y > 0, y, 0.2 * y)
        maps.append(y)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(named['map'], y)
    close(features, y.mean((1, 2)))
    assert named.keys() == ({'map'} if train else {'map', 'block1', 'block2'})
    for i in (1, 2):
        if not train:
            close(named[f'block{i}'], maps[i - 1])


def test_gradients_reach_every_parameter_and_remat_keeps_them():
    module, x = dcgan.make(**SMALL), images(4, 16, 16, 3)
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
        partial(models.init, dcgan.make(**SMALL)), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )
    factors = parameters.rate_factors(params, layer_decay=0.5)
    for i in (1, 2, 3):
        assert set(jax.tree.leaves(factors[f'block{i}'])) == {0.5 ** (4 - i)}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'widths': ()}, r'model\.widths: got none'),
        ({'widths': (8, 0)}, r'model\.widths\[1\]: got 0'),
        ({'dtype': 'float16'}, "unknown dtype 'float16'"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(UserError, match=message):
        dcgan.make(**options)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(UserError, match=r'need images of at least 8 pixels a side; got \[4, 16\]'):
        models.init(dcgan.make(**SMALL), jax.random.key(0), jnp.zeros((1, 4, 16, 3)))
