"""ViT and ResNet: shapes, sizes, formulas, gradients, devices, errors."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from contrastive_jax import config, models
from contrastive_jax.config import UserError
from contrastive_jax.layers.convolution import LAYOUT, convolve
from contrastive_jax.layers.heads import MLP
from contrastive_jax.models import resnet, vit

TINY_VIT = {'width': 16, 'depth': 1, 'heads': 2, 'patch': 4}
TINY_RESNET = {'widths': (8, 16), 'blocks': (1, 1), 'stem': 'patch4', 'zero_init_last': False}

leaves = jax.tree_util.tree_leaves_with_path


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@partial(jax.jit, static_argnums=0)
def init(module, x, **inputs):
    return models.init(module, jax.random.key(0), x, **inputs)


@partial(jax.jit, static_argnums=(0, 4))
def apply(module, params, stats, x, train, **inputs):
    return models.apply(module, params, stats, x, train, **inputs)


def drawn(module, x, **inputs):
    """(params, stats) of the module's structure, all of them random: no zeros, no ones."""
    rng = np.random.default_rng(1)

    def draw(path, like):
        v = rng.normal(size=like.shape)
        if path[-1].key == 'kernel':
            return np.float32(v / np.sqrt(np.prod(like.shape[:-1])))
        return np.float32((path[-1].key in ('scale', 'var')) + 0.2 * v.clip(-2, 2))

    structure = jax.eval_shape(partial(models.init, module), jax.random.key(0), x, **inputs)
    return jax.tree_util.tree_map_with_path(draw, structure)


def count(module: nn.Module, *shape: int) -> int:
    params, _ = jax.eval_shape(partial(models.init, module), jax.random.key(0), jnp.zeros(shape))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    return sum(p.size for p in jax.tree.leaves(params))


def output_shapes(module: nn.Module, *shape: int):
    x = jnp.zeros(shape)
    params, stats = jax.eval_shape(partial(models.init, module), jax.random.key(0), x)
    run = partial(models.apply, module, train=True)
    (features, extra), _ = jax.eval_shape(run, params, stats, x)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves((features, extra)))
    return features.shape, {k: v.shape for k, v in extra.items()}


def gradients(module):
    """(params, stats, x) -> ((value, new stats), gradients) of a random projection, jitted."""

    def loss(params, stats, x):
        outputs, stats = models.apply(module, params, stats, x, True)
        y = outputs[0] if isinstance(outputs, tuple) else outputs
        return (jnp.sin(y) * images(1, y.shape[-1])).sum() / y.shape[0], stats

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    ('size', 'published'),  # timm's counts without the classifier, learned positions included
    [('Ti', 5_524_416), ('S', 21_665_664), ('B', 85_798_656), ('L', 303_301_632)],
)
def test_vit_sizes(size, published):
    assert count(vit.make(size=size, position='learned'), 1, 224, 224, 3) == published
    width = vit.SIZES[size]['width']
    assert count(vit.make(size=size), 1, 224, 224, 3) == published - 197 * width


@pytest.mark.parametrize(
    ('size', 'published'),  # torchvision's counts without fc
    [(18, 11_176_512), (34, 21_284_672), (50, 23_508_032)],
)
def test_resnet_sizes(size, published):
    assert count(resnet.make(size=size), 1, 64, 64, 3) == published
    dimension = 512 if size < 50 else 2048
    assert output_shapes(resnet.make(size=size), 2, 224, 160, 3) == (
        (2, dimension),
        {'map': (2, 7, 5, dimension)},
    )


def test_vit_shapes_of_any_grid():
    cls, mean = vit.make(**TINY_VIT), vit.make(**TINY_VIT, pool='mean')
    assert output_shapes(cls, 3, 8, 8, 3) == ((3, 16), {'cls': (3, 16), 'patches': (3, 4, 16)})
    assert output_shapes(cls, 3, 8, 20, 1) == ((3, 16), {'cls': (3, 16), 'patches': (3, 10, 16)})
    assert output_shapes(mean, 3, 16, 4, 3) == ((3, 16), {'patches': (3, 4, 16)})
    # The same parameters take another size (multi-crop, fine-tuning).
    params, stats = drawn(cls, jnp.zeros((1, 8, 8, 3)))
    assert stats == {}
    run = partial(models.apply, cls, train=False)
    (features, _), _ = jax.eval_shape(run, params, stats, jnp.zeros((2, 16, 12, 3)))
    assert features.shape == (2, 16)


@pytest.mark.parametrize(
    ('stem', 'side'), [('imagenet', 4), ('cifar', 16), ('patch4', 8)]
)  # 32 pixels; the second stage halves
def test_resnet_stems(stem, side):
    for block, dimension in (('basic', 16), ('bottleneck', 64)):
        module = resnet.make(widths=(8, 16), blocks=(1, 2), block=block, stem=stem)
        wanted = (2, dimension), {'map': (2, side, side, dimension)}
        assert output_shapes(module, 2, 32, 32, 3) == wanted
    thin = resnet.make(size=18, widths=(32, 64, 128, 256), blocks=(1, 1, 1, 1), stem='cifar')
    assert count(thin, 1, 32, 32, 3) == 1_226_400  # as lightly's small one


def test_sincos_formula():
    rows, columns, width = 3, 5, 24
    table = vit.sincos2d(rows, columns, width)
    assert table.shape == (15, 24)
    for token in range(15):
        row, column = token // columns, token % columns
        for i in range(6):
            w = 10000.0 ** (-i / 6)
            wanted = [np.sin(row * w), np.cos(row * w), np.sin(column * w), np.cos(column * w)]
            np.testing.assert_allclose(table[token, i::6], wanted, atol=1e-7)


def test_positions_tell_patches_apart_and_not_cls():
    # Blank images: only positions can make tokens differ.
    x = jnp.zeros((1, 8, 8, 3))
    learned = vit.make(**TINY_VIT, position='learned')
    params, _ = init(learned, x)
    assert params['position_embedding'].shape == (1, 5, 16)
    assert 0.015 < float(params['position_embedding'].std()) < 0.025
    for module in (learned, vit.make(**TINY_VIT)):
        (_, extra), _ = apply(module, params, {}, x, False)
        assert len(np.unique(np.round(extra['patches'][0], 5), axis=0)) == 4
    bare = vit.make(**TINY_VIT).clone(depth=0)
    params['cls_token'] = jnp.arange(16.0)[None, None]
    (features, extra), _ = apply(bare, params, {}, x, False)
    layer_norm = lambda v: (v - v.mean(-1, keepdims=True)) / v.std(-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(features[0], layer_norm(np.arange(16.0)), atol=1e-5)
    np.testing.assert_allclose(extra['patches'][0], layer_norm(vit.sincos2d(2, 2, 16)), atol=1e-5)


def vit_oracle(params, image, patch, heads, mask=None, factor=lambda block, branch: 1.0):
    """One image through the paper's equations 1 to 4, token by token, in float64.

    mask: of its patches; factor: of what a block's first and second branch add.
    """
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)

    def norm(name, v, at=p):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
        return v * at[name]['scale'] + at[name]['bias']

    def dense(name, v, at=p):
        return v @ at[name]['kernel'] + at[name]['bias']

    height, wide, _ = image.shape
    cut = [
        image[r : r + patch, c : c + patch].reshape(-1)
        for r in range(0, height, patch)
        for c in range(0, wide, patch)
    ]
    x = dense('patch_embedding', np.stack(cut))
    width = x.shape[-1]
    for i in np.flatnonzero(mask if mask is not None else []):
        x[i] = p['mask_token'][0, 0]
    x = x + vit.sincos2d(height // patch, wide // patch, width)
    x = np.concatenate([p['cls_token'][0], x])
    tokens, attention = [], []
    for i in range(sum(k.startswith('block') for k in p)):
        b = p[f'block{i}']
        q, k, v = np.split(dense('qkv', norm('norm1', x, b), b['attention']), 3, axis=-1)
        size = width // heads
        mixed = []
        for h in range(heads):
            at = slice(h * size, (h + 1) * size)
            score = np.exp(q[:, at] @ k[:, at].T / np.sqrt(size))
            mixed.append(score / score.sum(-1, keepdims=True) @ v[:, at])
            attention.append(score[0, 1:] / score[0].sum())
        out = dense('out', np.concatenate(mixed, -1), b['attention'])
        x = x + factor(i, 0) * b.get('layer_scale1', 1.0) * out
        y = dense('mlp1', norm('norm2', x, b), b)
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + factor(i, 1) * b.get('layer_scale2', 1.0) * dense('mlp2', y, b)
        tokens.append(norm('norm', x))
    return tokens, np.stack(attention[-heads:])


@pytest.mark.parametrize(('scale', 'frozen', 'masked'), [(None, False, False), (0.1, True, True)])
def test_vit_is_the_papers(scale, frozen, masked):
    module = vit.make(**TINY_VIT | {'depth': 2}, layer_scale=scale, freeze_patch_embedding=frozen)
    x = images(2, 8, 12, 3)
    mask = np.array([[True, False, False, True, False, True], [False] * 5 + [True]])
    inputs = {'mask': jnp.asarray(mask)} if masked else {}
    params, stats = drawn(module, x, **inputs)
    assert ('mask_token' in params) == masked
    assert ('layer_scale1' in params['block1']) == (scale is not None)
    assert sorted(stats) == ['patch_embedding'] * frozen
    (features, extra), new = apply(module, params, stats, x, True, **inputs)
    jax.tree.map(np.testing.assert_array_equal, new, stats)
    assert extra.keys() == {'cls', 'patches'}
    (_, evaluated), _ = apply(module, params, stats, x, False, **inputs)
    close = partial(np.testing.assert_allclose, atol=1e-4)
    for i in range(2):
        image = np.asarray(x[i], np.float64)
        tokens, attention = vit_oracle(
            {**params, **stats}, image, 4, 2, mask[i] if masked else None
        )
        close(features[i], tokens[1][0])
        close(extra['cls'][i], tokens[1][0])
        close(extra['patches'][i], tokens[1][1:])
        close(evaluated['block0'][i], tokens[0][0])
        close(evaluated['block1'][i], tokens[1][0])
        close(evaluated['last4'][i], np.concatenate([tokens[0][0], tokens[1][0]]))
        close(evaluated['attention'][i], attention)


def test_vit_initialisation():
    params, _ = init(vit.make(width=64, depth=1, heads=4, patch=4), images(1, 8, 8, 3))
    block = params['block0']
    for kernel, fan in (
        (params['patch_embedding']['kernel'], 4 * 4 * 3 + 64),
        (block['attention']['qkv']['kernel'], 64 + 64),  # each of q, k, v by itself
        (block['attention']['out']['kernel'], 64 + 64),
        (block['mlp1']['kernel'], 64 + 256),
        (block['mlp2']['kernel'], 64 + 256),
    ):
        bound = np.sqrt(6 / fan)
        assert 0.97 * bound < float(jnp.abs(kernel).max()) <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)
    assert not any(p.any() for k, p in leaves(params) if k[-1].key == 'bias')
    module = vit.make(**TINY_VIT, layer_scale=0.25, freeze_patch_embedding=True)
    params, stats = init(module, images(1, 8, 8, 3), mask=jnp.ones((1, 4), bool))
    assert params['mask_token'].shape == (1, 1, 16)
    assert not params['mask_token'].any()
    for name in ('layer_scale1', 'layer_scale2'):
        np.testing.assert_array_equal(params['block0'][name], np.full(16, np.float32(0.25)))
    bound = np.sqrt(6 / (4 * 4 * 3 + 16))
    assert 'patch_embedding' not in params
    assert 0.9 * bound < float(jnp.abs(stats['patch_embedding']['kernel']).max()) <= bound


def test_masked_patches_are_not_seen():
    """What lies under the mask changes nothing, and its token learns; the rest is as without."""
    module = vit.make(**TINY_VIT)
    x, mask = images(2, 8, 8, 3), jnp.asarray([[True, False, False, True], [False] * 4])
    params, _ = drawn(module, x, mask=mask)
    (_, seen), _ = apply(module, params, {}, x, True, mask=mask)
    hidden = x.at[0, :4, :4].set(9.0).at[0, 4:, 4:].set(-9.0)
    (_, same), _ = apply(module, params, {}, hidden, True, mask=mask)
    np.testing.assert_array_equal(seen['patches'], same['patches'])
    (_, other), _ = apply(module, params, {}, x.at[0, 0, 4].set(9.0), True, mask=mask)
    assert float(jnp.abs(seen['patches'][0] - other['patches'][0]).min()) > 0
    (_, unmasked), _ = apply(module, params, {}, x, True)
    np.testing.assert_allclose(seen['patches'][1], unmasked['patches'][1], atol=1e-6)

    @jax.jit
    def gradient(params, x):
        loss = lambda p, x: jnp.sin(models.apply(module, p, {}, x, True, mask=mask)[0][0]).sum()  # noqa: E731
        return jax.grad(loss, (0, 1))(params, x)

    d_params, d_x = gradient(params, x)
    assert float(jnp.abs(d_params['mask_token']).max()) > 1e-3
    patches = d_x.reshape(2, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(2, 4, -1)
    np.testing.assert_array_equal(jnp.abs(patches).max(-1) == 0, mask)
    for wrong in (jnp.ones((2, 5), bool), jnp.ones((2, 4))):
        with pytest.raises(ValueError, match=r'expected a mask bool\[2, 4\]'):
            models.apply(module, params, {}, x, True, mask=wrong)


@pytest.mark.parametrize(('uniform', 'blocks'), [(False, (0.0, 0.25, 0.5)), (True, (0.5, 0.5))])
def test_drop_path_drops_branches_and_keeps_the_expectation(uniform, blocks):
    """Each image's output is one of those that the oracle has; how often, is as the rates say."""
    depth = len(blocks)
    module = vit.make(**TINY_VIT | {'depth': depth}, drop_path=0.5, drop_path_uniform=uniform)
    x, batch = images(1, 8, 8, 3), 512
    params, _ = drawn(module, x)
    rates = np.repeat(blocks, 2).reshape(depth, 2)
    image = np.asarray(x[0], np.float64)
    choices = np.where(rates > 0, 2, 1).ravel()
    combinations = np.array(list(np.ndindex(*choices))).reshape(-1, depth, 2)
    combinations[:, rates[:, 0] == 0] = 1  # such a block is never left out

    def cls(factor=lambda block, branch: 1.0):
        return vit_oracle(params, image, 4, 2, factor=factor)[0][-1][0]

    wants = np.stack([
        cls(lambda i, j, c=c: c[i, j] / (1 - rates[i, j])) for c in combinations
    ])  # fmt: skip
    many = jnp.repeat(x, batch, axis=0)
    (features, _), _ = apply(module, params, {}, many, True, key=jax.random.key(4))
    distance = np.abs(np.asarray(features)[:, None] - wants[None]).max(-1)
    assert distance.min(1).max() < 1e-4
    assert np.sort(distance, 1)[:, 1].min() > 1e-2
    kept = combinations[distance.argmin(1)]
    np.testing.assert_allclose(kept.mean(0), 1 - rates, atol=4 * 0.5 / np.sqrt(batch))
    correlation = np.corrcoef(kept[:, rates > 0].T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(batch)
    # All of it in evaluation, whether there is a key or not; other keys draw otherwise.
    (plain, _), _ = apply(module, params, {}, x, False)
    np.testing.assert_allclose(plain[0], cls(), atol=1e-4)
    (keyed, _), _ = apply(module, params, {}, x, False, key=jax.random.key(4))
    np.testing.assert_array_equal(keyed, plain)
    (other, _), _ = apply(module, params, {}, many, True, key=jax.random.key(5))
    assert not np.array_equal(other, features)
    (teacher, _), _ = apply(module, params, {}, x, True)  # no key, nothing dropped
    np.testing.assert_array_equal(teacher, plain)


def keys(t: float) -> float:
    """The cubic kernel of Keys 1981 with a = −1/2."""
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def test_learned_positions_on_another_grid():
    table = np.random.default_rng(0).normal(size=(1, 17, 3)).astype(np.float32)
    grid = table[0, 1:].reshape(4, 4, 3).astype(np.float64)
    for rows, columns in ((3, 3), (2, 7), (6, 6)):
        got = vit.resample(jnp.asarray(table), rows, columns, True)
        assert got.shape == (1, 1 + rows * columns, 3)
        np.testing.assert_array_equal(got[0, 0], table[0, 0])
        for r in range(rows):
            for c in range(columns):
                down = [keys((r + 0.5) * 4 / rows - 0.5 - i) for i in range(4)]
                across = [keys((c + 0.5) * 4 / columns - 0.5 - i) for i in range(4)]
                weights = np.outer(down, across) / (sum(down) * sum(across))
                want = (weights[:, :, None] * grid).sum((0, 1))
                np.testing.assert_allclose(got[0, 1 + r * columns + c], want, atol=1e-5)
    np.testing.assert_array_equal(vit.resample(jnp.asarray(table[:, 1:]), 4, 4, False),
                                  table[:, 1:])  # fmt: skip
    module = vit.make(**TINY_VIT, position='learned')
    params, _ = drawn(module, images(1, 16, 16, 3))
    (_, extra), _ = apply(module, params, {}, images(2, 8, 12, 3), True)
    assert extra['patches'].shape == (2, 6, 16)
    # As if the resampled positions had been learned.
    known = {**params, 'position_embedding': vit.resample(params['position_embedding'], 2, 3, True)}
    (_, want), _ = apply(module, known, {}, images(2, 8, 12, 3), True)
    np.testing.assert_allclose(extra['patches'], want['patches'], atol=1e-5)
    wide, _ = drawn(module, images(1, 8, 20, 3))
    with pytest.raises(UserError, match='2 x 2 patches, but learned the positions of 10'):
        models.apply(module, wide, {}, images(1, 8, 8, 3), True)


def convolution(x, kernel, stride, padding):
    """[H, W, C] by loops, torch's symmetric padding."""
    side = kernel.shape[0]
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    places = [range(0, x.shape[a] - side + 1, stride) for a in (0, 1)]
    return np.array([
        [np.einsum('pqc,pqcd->d', x[i : i + side, j : j + side], kernel) for j in places[1]]
        for i in places[0]
    ])  # fmt: skip


@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
def test_resnet_is_the_papers(block):
    """One image, with running averages, against loops in float64."""
    module = resnet.make(widths=(4, 8), blocks=(1, 1), block=block, stem='imagenet')
    x = images(1, 16, 12, 3)
    params, stats = drawn(module, x)
    (features, extra), _ = apply(module, params, stats, x, False)
    p, s = jax.tree.map(lambda v: np.asarray(v, np.float64), (params, stats))

    def norm(name, v, p=p, s=s):
        v = (v - s[name]['mean']) / np.sqrt(s[name]['var'] + 1e-5)
        return v * p[name]['scale'] + p[name]['bias']

    relu = partial(np.maximum, 0.0)
    y = relu(norm('stem_norm', convolution(np.asarray(x[0]), p['stem']['kernel'], 2, 3)))
    y = np.pad(y, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    y = np.array([
        [y[i : i + 3, j : j + 3].max((0, 1)) for j in range(0, y.shape[1] - 2, 2)]
        for i in range(0, y.shape[0] - 2, 2)
    ])  # fmt: skip
    for stage, stride in ((1, 1), (2, 2)):
        b, t = p[f'stage{stage}_block0'], s[f'stage{stage}_block0']
        names = [k for k in sorted(b) if k.startswith('conv')]
        wide = {'basic': [stride, 1], 'bottleneck': [1, stride, 1]}[block]
        z = y
        for i, (name, step) in enumerate(zip(names, wide, strict=True), 1):
            kernel = b[name]['kernel']
            z = norm(f'norm{i}', convolution(z, kernel, step, kernel.shape[0] // 2), b, t)
            z = relu(z) if i < len(names) else z
        if 'shortcut' in b:
            y = norm('shortcut_norm', convolution(y, b['shortcut']['kernel'], stride, 0), b, t)
        y = relu(y + z)
    np.testing.assert_allclose(extra['map'][0], y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features[0], y.mean((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('batch', 'side', 'stride', 'padding', 'size'),
    [
        *[(12, 3, 1, 1, 5), (7, 3, 2, 1, 6), (16, 4, 2, 1, 8), (3, 1, 2, 0, 4), (17, 7, 2, 3, 9)],
        # maps smaller than the kernel: not a convolution of XLA's on a CPU
        *[(5, 3, 1, 1, 2), (4, 3, 2, 1, 1), (6, 7, 2, 3, 3)],
    ],
)
def test_convolution_and_its_gradients(batch, side, stride, padding, size):
    """Ours (the kernel's tiled over the batch) against XLA's, and loops in float64."""
    x = images(batch, size, size + 2, 3)
    kernel = images(side, side, 3, 4)
    y, pull = jax.vjp(lambda x, k: convolve(x, k, stride, padding), x, kernel)
    d_y = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    d_x, d_kernel = pull(d_y)
    xla = partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=LAYOUT,
    )
    like, back = jax.vjp(xla, x, kernel)
    np.testing.assert_allclose(y, like, atol=1e-4)
    want = back(d_y)
    np.testing.assert_allclose(d_x, want[0], atol=1e-4)
    np.testing.assert_allclose(d_kernel, want[1], atol=1e-4)
    padded = np.pad(np.float64(x), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    loops = np.zeros(kernel.shape)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            at = padded[:, i * stride : i * stride + side, j * stride : j * stride + side]
            loops += np.einsum('bpqc,bd->pqcd', at, np.float64(d_y[:, i, j]))
    np.testing.assert_allclose(d_kernel, loops, atol=1e-4)


def test_attention_pooling_is_the_papers():
    """Two heads of 64: the mean's query against the mean and every place."""
    module = resnet.AttentionPool()
    x = images(2, 2, 3, 128)
    params = drawn_pool(module, x)
    got = module.apply({'params': params}, x)
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    for image, found in zip(np.asarray(x, np.float64), got, strict=True):
        places = image.reshape(6, 128)
        tokens = np.concatenate([places.mean(0, keepdims=True), places])
        tokens = tokens + p['position_embedding'][0]
        q = tokens[0] @ p['query']['kernel'] + p['query']['bias']
        k = tokens @ p['key']['kernel']
        v = tokens @ p['value']['kernel'] + p['value']['bias']
        for head in (slice(0, 64), slice(64, 128)):
            score = np.exp(k[:, head] @ q[head] / 8)
            np.testing.assert_allclose(found[head], score / score.sum() @ v[:, head], atol=1e-4)


def drawn_pool(module, x):
    rng = np.random.default_rng(1)
    like = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    return jax.tree.map(lambda v: np.float32(rng.normal(size=v.shape) / 11), like)


def test_resnet_starts_as_the_identity():
    for zero in (True, False):
        module = resnet.make(widths=(8,), blocks=(1,), stem='cifar', zero_init_last=zero)
        x = images(2, 4, 4, 3)
        params, stats = init(module, x)
        assert float(params['stage1_block0']['norm2']['scale'].sum()) == (0 if zero else 8)
        assert float(params['stage1_block0']['norm1']['scale'].sum()) == 8
        assert all(v.any() == (k[-1].key == 'var') for k, v in leaves(stats))
    kernel = params['stage1_block0']['conv1']['kernel']  # He: variance 2 / (3 * 3 * 8)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 72), rtol=0.1)


FROZEN_AND_SCALED = {'freeze_patch_embedding': True, 'layer_scale': 0.1}
ALIVE = {
    'vit cls': (vit.make(**TINY_VIT, position='learned'), (16, 8, 8, 3)),
    'vit mean': (vit.make(**TINY_VIT, pool='mean', **FROZEN_AND_SCALED), (16, 8, 8, 3)),
    'resnet': (resnet.make(**TINY_RESNET), (16, 8, 8, 3)),
    'resnet attention': (resnet.make(**TINY_RESNET, pool='attention'), (16, 16, 8, 3)),
    'head': (MLP(hidden=16, out=8, layers=3, last_batch_norm=True), (16, 12)),
}


@pytest.mark.parametrize('name', ['vit cls', 'resnet'])
def test_bfloat16_is_close_to_float32(name):
    module, shape = ALIVE[name]
    x = images(*shape)
    params, stats = drawn(module, x)
    (want, _), _ = apply(module, params, stats, x, True)
    half = module.clone(dtype=jnp.bfloat16)
    (got, extra), new = apply(half, params, stats, x, True)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves((got, extra, new)))
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize('name', ALIVE)
def test_gradients_reach_every_parameter_on_one_device_and_eight(name):
    """Values, gradients and BatchNorm's averages on 8 devices are those of the whole batch."""
    module, shape = ALIVE[name]
    x = images(*shape)
    x = x * jnp.linspace(0.2, 3.0, 16).reshape(-1, *[1] * (x.ndim - 1))  # devices' shares differ
    params, stats = drawn(module, x)
    f = gradients(module)
    (value, new), grads = f(params, stats, x)
    assert np.isfinite(value)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for path, g in leaves(grads):
        assert np.isfinite(g).all(), path
        g = np.abs(g)
        if path[-1].key == 'bias' and any(k.key == 'qkv' for k in path):
            g = np.delete(g.reshape(3, -1), 1, axis=0)  # softmax takes no notice of k's bias
        assert g.max() > 1e-5 * largest, path

    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P('data')))
    params, stats = jax.device_put((params, stats), NamedSharding(mesh, P()))
    (value8, new8), grads8 = f(params, stats, sharded)
    np.testing.assert_allclose(value8, value, rtol=1e-5, atol=1e-6)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * largest)
    jax.tree.map(close, grads8, grads)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), new8, new)


@pytest.mark.parametrize('name', ['vit cls', 'resnet'])
@pytest.mark.parametrize('how', ['remat', 'microbatched'])
def test_memory_is_saved_without_changing_gradients(name, how):
    """BatchNorm apart, whose statistics are then a micro-batch's."""
    module, shape = ALIVE[name]
    x = images(*shape)
    params, stats = drawn(module, x)
    (value, _), grads = gradients(module)(params, stats, x)
    other = module.clone(remat=True) if how == 'remat' else models.Microbatched(module, 4)
    (got, new), got_d = gradients(other)(params, stats, x)
    if stats and how == 'microbatched':
        one_by_one = stats
        for part in range(4):
            _, one_by_one = apply(module, params, one_by_one, x[part::4], True)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), new, one_by_one)
        return
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest)
    jax.tree.map(close, got_d, grads)


@pytest.mark.parametrize('parts', [2, 3, 4])
def test_a_microbatch_holds_all_views_of_its_records(parts):
    """BatchNorm sees both views in every part, whether their number is even or odd."""
    module, shape = ALIVE['resnet']
    views = images(12, 2, *shape[1:]) * jnp.asarray([0.5, 2.0]).reshape(1, 2, 1, 1, 1)
    rows = views.reshape(24, *shape[1:])
    params, stats = drawn(module, rows)
    cut = models.Microbatched(module, parts, records=12)
    got, new = apply(cut, params, stats, rows, True)
    one_by_one, expected = stats, np.zeros((12, 2, got[0].shape[1]), np.float32)
    for part in range(parts):
        some = views[part::parts].reshape(24 // parts, *shape[1:])
        (features, _), one_by_one = apply(module, params, one_by_one, some, True)
        expected[part::parts] = features.reshape(12 // parts, 2, -1)
    np.testing.assert_allclose(got[0].reshape(12, 2, -1), expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), new, one_by_one)
    # Rows that are no views of so many records are cut one by one, as in evaluation.
    other = apply(cut, params, stats, rows[: 4 * parts], False)[0][0]
    plain = apply(module, params, stats, rows[: 4 * parts], False)[0][0]
    np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-5)


def test_microbatches_take_their_share_of_masks_and_keys():
    """As one application to each part's rows with the part's key, values and gradients."""
    whole = vit.make(**TINY_VIT | {'depth': 2}, drop_path=0.5)
    module = models.Microbatched(whole.clone(remat=True), 2)
    x, mask = images(16, 8, 8, 3), jnp.asarray(np.random.default_rng(2).random((16, 4)) < 0.4)
    params, stats = drawn(whole, x, mask=mask)
    key, weight = jax.random.key(11), images(16, 16)

    def by_parts(params):
        (features, _), _ = models.apply(module, params, stats, x, True, key=key, mask=mask)
        return (features * weight).sum(), features

    def one_by_one(params):
        parts = [
            models.apply(whole, params, stats, x[i::2], True, key=part, mask=mask[i::2])[0][0]
            for i, part in enumerate(jax.random.split(key, 2))
        ]
        features = jnp.stack(parts, axis=1).reshape(16, -1)
        return (features * weight).sum(), features

    (_, got), got_d = jax.jit(jax.value_and_grad(by_parts, has_aux=True))(params)
    (_, want), want_d = jax.jit(jax.value_and_grad(one_by_one, has_aux=True))(params)
    np.testing.assert_allclose(got, want, atol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_d))
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest)
    jax.tree.map(close, got_d, want_d)


def test_a_key_means_nothing_to_what_draws_nothing():
    for module in (resnet.make(**TINY_RESNET), vit.make(**TINY_VIT)):
        x = images(4, 8, 8, 3)
        params, stats = drawn(module, x)
        plain = apply(module, params, stats, x, True)
        keyed = apply(module, params, stats, x, True, key=jax.random.key(1))
        jax.tree.map(np.testing.assert_array_equal, plain, keyed)


def test_config_lists_the_models():
    assert isinstance(
        config.build('models', {'name': 'vit', 'size': 'Ti'}, 'config.model'), vit.ViT
    )
    exist = "'dcgan', 'lab', 'nin', 'resnet', 'transformer', 'vit'"
    with pytest.raises(UserError, match=rf"Did you mean 'resnet'.*Exists: {exist}"):
        config.build('models', {'name': 'resmet'}, 'config.model')
    with pytest.raises(UserError, match=r"unknown key 'pach'\. Did you mean 'patch'"):
        config.build('models', {'name': 'vit', 'pach': 2}, 'config.model')


@pytest.mark.parametrize(
    ('make', 'options', 'parts'),
    [
        (vit.make, {}, ["size='custom'", "'width'"]),
        (vit.make, {'size': 'XL'}, ["unknown size 'XL'", "'Ti', 'S', 'B', 'L', 'custom'"]),
        (vit.make, {**TINY_VIT, 'heads': 3}, ['width=16', 'heads=3']),
        (vit.make, {**TINY_VIT, 'width': 18}, ['width=18', 'multiple of 4']),
        (vit.make, {**TINY_VIT, 'patch': 0}, ['config.model.patch', 'got 0']),
        (vit.make, {**TINY_VIT, 'pool': 'max'}, ["'max'", "'cls', 'mean'"]),
        (vit.make, {**TINY_VIT, 'position': 'sincos'}, ["Did you mean 'sincos2d'"]),
        (vit.make, {**TINY_VIT, 'drop_path': 1.0}, ['config.model.drop_path', '1.0', 'below 1']),
        (vit.make, {**TINY_VIT, 'layer_scale': 0.0}, ['config.model.layer_scale', 'above 0']),
        (vit.make, {**TINY_VIT, 'dtype': 'float16'}, ["'float16'", "'float32', 'bfloat16'"]),
        (resnet.make, {}, ["size='custom'", "'widths'"]),
        (resnet.make, {'size': 19}, ["unknown size '19'", "'18', '34', '50', '101', 'custom'"]),
        (resnet.make, {'widths': (8, 16), 'blocks': (1,)}, ['(8, 16)', '(1,)']),
        (
            resnet.make,
            {'size': 18, 'blocks': (2, 0, 2, 2)},
            ['config.model.blocks[1]: got 0', 'at least 1'],
        ),
        (resnet.make, {'size': 18, 'block': 'bottle'}, ["Did you mean 'bottleneck'"]),
        (resnet.make, {'size': 18, 'stem': 'cfar'}, ["Did you mean 'cifar'"]),
    ],
)
def test_errors_say_what_to_do(make, options, parts):
    with pytest.raises(UserError) as error:
        make(**options)
    for part in parts:
        assert part in str(error.value)


def test_error_of_a_call():
    with pytest.raises(UserError, match='10 x 8 pixels and patch=4'):
        init(vit.make(**TINY_VIT), images(1, 10, 8, 3))
