"""Tables of permutations and of pairs, and what methods on tiles refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax.config import UserError, build
from contrastive_jax.methods import jigsaw, relative_patch


def model():
    return build(
        'models', {'name': 'resnet', 'stem': 'patch4', 'widths': (8,), 'blocks': (1,)}, 'test'
    )


def test_permutations_differ_in_many_places():
    table = jigsaw.far_apart(9, 100)
    assert (np.sort(table, axis=1) == np.arange(9)).all()
    distance = (table[:, None] != table[None]).sum(2)[np.triu_indices(100, 1)]
    assert distance.min() >= 2
    assert distance.mean() > 8.0  # of permutations that are drawn it is 8.0
    np.testing.assert_array_equal(table[:30], jigsaw.far_apart(9, 30))


def test_every_permutation_is_the_farthest_of_those_left():
    """By brute force, of four tiles; all 24 are there at last, once."""
    table = jigsaw.far_apart(4, 24)
    assert len(np.unique(table, axis=0)) == 24
    for i in range(1, 24):
        mean = (table[i:, None] != table[None, :i]).sum(2).mean(1)
        assert mean[0] == mean.max()


def test_pairs_are_all_neighbours_in_both_orders():
    pairs, direction = relative_patch.pairs(9)
    assert len(pairs) == len(np.unique(pairs, axis=0)) == 40
    of_the_middle = {int(b): int(k) for (a, b), k in zip(pairs, direction, strict=True) if a == 4}
    assert of_the_middle == {0: 0, 1: 1, 2: 2, 3: 3, 5: 4, 6: 5, 7: 6, 8: 7}
    known = {tuple(p): k for p, k in zip(pairs.tolist(), direction.tolist(), strict=True)}
    assert all(known[b, a] == 7 - k for (a, b), k in known.items())


def test_a_constant_answer_is_at_chance():
    """Of the forty pairs some directions are more frequent; each counts as much as the others."""
    method = relative_patch.make(model(), hidden=8)
    params, extra = method.init(jax.random.key(0), {'views': jnp.zeros((1, 9, 8, 8, 3))}, 9)
    for k in range(8):
        bias = 100 * jax.nn.one_hot(k, 8)
        params['head']['linear2'] = {**params['head']['linear2'], 'bias': bias}
        score = method.task.score(
            params, extra, {'views': jnp.zeros((2, 9, 8, 8, 3))}, jax.random.key(0)
        )
        np.testing.assert_allclose(score['accuracy'], 1 / 8, rtol=1e-5)


def test_the_task_is_the_same_each_time_and_has_as_many_orders_as_are_set():
    method = jigsaw.make(model(), permutations=20, orders=3, width=8, hidden=8)
    views = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 8, 8, 3)), jnp.float32)
    params, extra = method.init(jax.random.key(0), {'views': views}, 9)
    key = jax.random.key(0)
    one, again = (method.task.score(params, extra, {'views': views}, key) for _ in range(2))
    np.testing.assert_array_equal(one['accuracy'], again['accuracy'])
    assert np.isclose((one['accuracy'] * 3) % 1, 0, atol=1e-5).all()


@pytest.mark.parametrize(
    ('make', 'count', 'message'),
    [
        (lambda: relative_patch.make(model()), 8, 'got 8 views; relative_patch needs a square'),
        (lambda: jigsaw.make(model(), permutations=9), 4, 'got 4 views; jigsaw needs 9 tiles'),
        (lambda: jigsaw.make(model(), tiles=3, permutations=7), 3, 'got 7; 3 tiles have 6'),
        (lambda: jigsaw.make(model(), tiles=10), 10, r'tiles: got 10; .* from 2 to 9'),
        (lambda: jigsaw.make(model(), orders=0), 9, 'orders: got 0; jigsaw expects'),
    ],
)
def test_errors_say_what_to_do(make, count, message):
    with pytest.raises(UserError, match=message):
        make().init(jax.random.key(0), {'views': jnp.zeros((1, count, 8, 8, 3))}, 9)
