"""The order of training: every epoch all records, no batch one of them twice."""

import threading

import numpy as np
import pytest

from contrastive_jax.inputs import order
from contrastive_jax.inputs.order import Order


@pytest.mark.parametrize('count', range(1, 14))
def test_no_batch_holds_a_record_twice_and_every_epoch_all(count):
    """Every batch size, until batches and epochs begin together again, and on."""
    for batch in range(1, count + 1):
        epochs = 2 * batch + 1
        whole = Order(3, count, batch)
        records = np.array([whole(g) for g in range(count * epochs)])
        for e in range(epochs):
            np.testing.assert_array_equal(
                np.sort(records[e * count :][:count]), np.arange(count), err_msg=f'{batch} {e}'
            )
        for j in range(len(records) // batch):
            rows = records[j * batch :][:batch]
            assert len(set(rows)) == batch, (batch, j)
            np.testing.assert_array_equal(whole.batch_of(j * batch + batch // 2), rows)
            others = [list(whole.others(j * batch + row)) for row in range(batch)]
            dealt = np.concatenate([rows, *others])
            np.testing.assert_array_equal(np.sort(dealt), np.arange(count))
            if count >= 3 * batch:
                assert min(map(len, others)) >= 1


@pytest.mark.parametrize(('count', 'batch'), [(7, 5), (13, 8), (20, 8), (40, 39), (100, 64)])
def test_a_position_s_record_depends_on_nothing_else(count, batch):
    """In any order of asking, from any start, from several threads."""
    last = 60 * count
    once = Order(0, count, batch)
    expected = [once(g) for g in range(last)]
    rng = np.random.default_rng(1)
    for g in rng.integers(0, last, 20):
        assert Order(0, count, batch)(int(g)) == expected[g]
    shared, wrong = Order(0, count, batch), []

    def ask(seed):
        for g in np.random.default_rng(seed).integers(0, last, 300):
            if shared(int(g)) != expected[g]:
                wrong.append(g)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [Order(1, count, batch)(g) for g in range(last)] != expected


def test_only_what_would_come_twice_changes_places():
    """The first epoch, and where batches fill epochs every one, are the permutations themselves."""
    count, batch = 1000, 128
    found = Order(5, count, batch)
    for e in range(9):
        plain = np.random.default_rng([5, e]).permutation(np.arange(count, dtype=np.int32))
        np.testing.assert_array_equal(Order(5, count, 125).epoch(e), plain)
        moved = np.flatnonzero(found.epoch(e) != plain)
        # At most two places for each of about t·(B − t)/N repetitions.
        assert e > 0 or not moved.size
        assert moved.size <= 24
        assert moved.size == 0 or moved.max() < batch


def test_few_epochs_are_kept(monkeypatch):
    made = []
    permutation = Order._permutation
    monkeypatch.setattr(
        Order, '_permutation', lambda self, e: made.append(e) or permutation(self, e)
    )
    for count, batch, kept in ((100, 64, order.KEPT), (1000, 64, 2)):
        found = Order(0, count, batch)
        made.clear()
        for e in range(100):
            found.epoch(e)
        assert len(made) <= 200
        assert len(found._kept) <= kept
