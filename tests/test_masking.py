"""Block-wise masks: how many patches, where, whose draws; against loops in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import parallel
from contrastive_jax.augment.masking import PROPOSALS, block_mask
from contrastive_jax.config import UserError

OPTIONS = ('batch', 'rows', 'columns', 'ratio', 'prob', 'min_patches', 'aspect')
draw = jax.jit(block_mask, static_argnames=OPTIONS)


def oracle(key, image, rows, columns, low, high, prob, min_patches, aspect):
    """One image's mask from the same random numbers, patch by patch."""
    n = rows * columns
    draws = jax.random.uniform(jax.random.fold_in(key, image), (2 + 4 * PROPOSALS + n,))
    draws = np.asarray(draws, np.float64)
    mask = np.zeros((rows, columns), bool)
    if draws[0] >= prob:
        return mask.reshape(-1)
    wanted = round((low + (high - low) * draws[1]) * n)
    for trial in draws[2 : 2 + 4 * PROPOSALS].reshape(-1, 4):
        missing = wanted - mask.sum()
        area = min_patches + trial[0] * max(missing - min_patches, 0)
        shape = np.exp((2 * trial[1] - 1) * np.log(aspect))
        height, width = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
        if height > rows or width > columns or height * width < min_patches:
            continue
        top = int(trial[2] * (rows - height + 1))
        left = int(trial[3] * (columns - width + 1))
        with_block = mask.copy()
        with_block[top : top + height, left : left + width] = True
        if with_block.sum() <= wanted:
            mask = with_block
    mask = mask.reshape(-1)
    order = np.argsort(draws[2 + 4 * PROPOSALS :], kind='stable')
    for patch in order[~mask[order]][: wanted - mask.sum()]:
        mask[patch] = True
    return mask


@pytest.mark.parametrize(
    ('rows', 'columns', 'ratio', 'prob', 'min_patches', 'aspect'),
    [
        (14, 14, (0.1, 0.5), 0.5, 4, 0.3),
        (5, 9, (0.0, 1.0), 1.0, 1, 0.1),
        (4, 4, (0.75, 0.75), 1.0, 16, 1.0),  # no rectangle fits: patches at random
    ],
)
def test_loops_agree(rows, columns, ratio, prob, min_patches, aspect):
    key, batch = jax.random.key(5), 24
    mask = draw(key, batch, rows, columns, ratio=ratio, prob=prob, min_patches=min_patches,
                aspect=aspect)  # fmt: skip
    assert mask.shape == (batch, rows * columns)
    assert mask.dtype == jnp.bool_
    for image in range(batch):
        want = oracle(key, image, rows, columns, *ratio, prob, min_patches, aspect)
        assert np.array_equal(mask[image], want), image


def test_shares_are_uniform_and_exact():
    share = np.asarray(draw(jax.random.key(0), 2000, 7, 7)).mean(1)
    masked = share[share > 0]
    assert 0.45 < len(masked) / 2000 < 0.55
    assert masked.min() >= 0.1 - 0.5 / 49
    assert masked.max() <= 0.5 + 0.5 / 49
    np.testing.assert_allclose(
        np.histogram(masked, 4, (0.1, 0.5))[0] / len(masked), 0.25, atol=0.06
    )
    mask = draw(jax.random.key(1), 50, 7, 7, ratio=0.3, prob=1.0)
    assert np.all(mask.sum(1) == 15)
    assert not draw(jax.random.key(1), 50, 3, 3, prob=0.0).any()
    assert draw(jax.random.key(1), 3, 1, 1, ratio=1.0, prob=1.0).all()


def neighbours(mask_BHW: np.ndarray) -> float:
    """The share of a masked patch's neighbours that are masked, too."""
    pairs = (mask_BHW[:, 1:], mask_BHW[:, :-1]), (mask_BHW[:, :, 1:], mask_BHW[:, :, :-1])
    return sum((a & b).sum() for a, b in pairs) / sum((a | b).sum() for a, b in pairs)


def test_masks_are_blocks():
    mask = np.asarray(draw(jax.random.key(2), 300, 14, 14, ratio=0.3, prob=1.0))
    alone = np.random.default_rng(0).permuted(mask, axis=1)
    together, apart = (neighbours(m.reshape(-1, 14, 14)) for m in (mask, alone))
    assert apart < 0.2 < 0.45 < together
    assert mask.mean(0).min() > 0  # also the corners are met
    assert not np.array_equal(mask[0], mask[1])


def test_an_images_draws_are_its_own():
    key = jax.random.key(7)
    few, many = draw(key, 8, 6, 8), draw(key, 32, 6, 8)
    assert np.array_equal(few, many[:8])
    assert not np.array_equal(few, draw(jax.random.key(8), 8, 6, 8))
    mesh = parallel.make_mesh()
    sharded = jax.jit(partial(block_mask, batch=32, rows=6, columns=8),
                      out_shardings=parallel.rows(mesh))(key)  # fmt: skip
    assert np.array_equal(sharded, many)


@pytest.mark.parametrize(
    ('change', 'parts'),
    [
        ({'ratio': (0.5, 0.1)}, ['block_mask.ratio', 'ascending']),
        ({'ratio': (0.5, 1.1)}, ['block_mask.ratio', '1.1']),
        ({'prob': 2.0}, ['block_mask.prob', 'from 0 to 1']),
        ({'min_patches': 0}, ['block_mask.min_patches', 'at least 1']),
        ({'aspect': 0.0}, ['block_mask.aspect']),
        ({'rows': 0}, ['block_mask.rows', 'at least 1']),
    ],
)
def test_errors_say_what_to_do(change, parts):
    with pytest.raises(UserError) as error:
        block_mask(jax.random.key(0), 2, **{'rows': 4, 'columns': 4, **change})
    for part in parts:
        assert part in str(error.value)
