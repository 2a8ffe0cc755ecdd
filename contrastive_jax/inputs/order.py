"""The order in which training visits records: every epoch all of them, no batch one of them twice.

Position g = 0, 1, 2, ... runs over the rows of all global batches: batch j holds positions
[j·B, (j+1)·B), epoch e positions [e·N, (e+1)·N). An epoch's order is a permutation keyed by (seed,
e). Where a batch straddles two epochs, those of its records that the second epoch would bring again
change places with the next ones after the batch.

Dimension key: B rows of a batch, N records, t rows of a batch that the epoch before has filled.
"""

from collections.abc import Iterator

import numpy as np

KEPT = 16  # epochs of fewer than two batches; of larger ones two


class Order:
    """Records by position, a pure function of (seed, N, B).

    What changes places lies within the first B places of an epoch. From 2·B records on the end of
    an epoch, all that the next one asks of it, is therefore the permutation's own. With fewer
    records an epoch depends on the one before, back to one that begins with a batch. The last few
    are kept, so that only a start in the middle has to walk there.

    Args:
        seed: an integer, at least 0.
        count: N, at least B.
        batch: B.
    """

    def __init__(self, seed: int, count: int, batch: int):
        self.seed, self.count, self.batch = seed, count, batch
        self._kept: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> int:
        """The record at a position."""
        epoch, place = divmod(position, self.count)
        return int(self.epoch(epoch)[place])

    def batch_of(self, position: int) -> np.ndarray:
        """[B] int32: the records of the batch that a position is in."""
        epoch, place = divmod(position - position % self.batch, self.count)
        found = self.epoch(epoch)[place : place + self.batch]
        missing = self.batch - len(found)
        return np.append(found, self.epoch(epoch + 1)[:missing]) if missing else found

    def others(self, position: int) -> Iterator[int]:
        """Records in the place of a position's that cannot be used.

        They are not in its batch, and other rows of the batch get others: those of the epoch in
        which the batch ends, behind it and around to it, are dealt to the rows in turn.
        """
        row, batch = position % self.batch, self.batch_of(position)
        epoch, last = divmod(position - row + self.batch - 1, self.count)
        order, inside = self.epoch(epoch), min(last + 1, self.batch)
        for ahead in range(row, self.count - inside, self.batch):
            if (index := int(order[(last + 1 + ahead) % self.count])) not in batch:
                yield index

    def epoch(self, e: int) -> np.ndarray:
        """[N] int32: the records of an epoch, in their order."""
        kept = self._kept  # other threads put another dict in its place, and never change this one
        if e in kept:
            return kept[e]
        chained = self.count < 2 * self.batch
        at = e if self._filled(e) == 0 else e - 1
        while chained and at not in kept and self._filled(at):
            at -= 1
        walked = {at: kept[at] if at in kept else self._permutation(at)}
        for following in range(at + 1, e + 1):
            walked[following] = self._without_repeats(walked[following - 1], following)
            if len(walked) > KEPT:
                del walked[following - KEPT]
        if not chained:
            walked = {e: walked[e]}  # the one before may lack its own changes
        newest = list((kept | walked).items())[-(KEPT if chained else 2) :]
        self._kept = dict(newest)
        return walked[e]

    def _filled(self, e: int) -> int:
        """t, of the batch in which an epoch begins; 0 if it begins with a batch."""
        return e * self.count % self.batch

    def _permutation(self, e: int) -> np.ndarray:
        # Not grain's shuffle: through its MapDataset an index costs 20 to 70 µs, as much as a row.
        records = np.arange(self.count, dtype=np.int32)
        return np.random.default_rng([self.seed, e]).permutation(records)

    def _without_repeats(self, before: np.ndarray, e: int) -> np.ndarray:
        order, t = self._permutation(e), self._filled(e)
        if t == 0:
            return order
        taken = np.zeros(self.count, bool)
        taken[before[-t:]] = True
        there = taken[order[: self.batch]]
        # As many as `repeated` are free: of the t places behind the batch, t less those at most
        # are taken.
        repeated = np.flatnonzero(there[: self.batch - t])
        free = self.batch - t + np.flatnonzero(~there[self.batch - t :])[: len(repeated)]
        order[repeated], order[free] = order[free], order[repeated]
        return order
