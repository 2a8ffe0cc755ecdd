"""Between parameters of ours and those of a file: names, orders of axes, what is split or fused.

A table maps a module or a single parameter of ours to theirs. A module's parameters follow torch's
conventions (a kernel is their weight with the outputs first); a single parameter is taken as it is,
but for axes of length 1. In a table '{i}' stands for a block, '{s}' for a stage from 1, '{z}'
from 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from contrastive_jax.config import UserError

LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
LISTED = 5  # of each kind of mistake


class Part(NamedTuple):
    """One of `count` arrays that a file keeps in one, along its first axis."""

    name: str
    index: int
    count: int


class Flat(NamedTuple):
    """A parameter that a file keeps without leading axes of length 1."""

    name: str


Theirs = str | tuple[str, ...] | Part | Flat
Table = Mapping[str, Theirs]


def expand(table: Table, places: Sequence[Mapping[str, int]]) -> dict[str, Theirs]:
    """The table with a row for each block, whose place is formatted into the names."""
    out: dict[str, Theirs] = {}
    for ours, theirs in table.items():
        for place in places if '{' in ours else ({},):
            out[ours.format(**place)] = renamed(theirs, lambda name, at=place: name.format(**at))
    return out


def renamed(theirs: Theirs, change: Callable[[str], str]) -> Theirs:
    """Theirs with every name in it changed."""
    if isinstance(theirs, str):
        return change(theirs)
    if isinstance(theirs, (Part, Flat)):
        return theirs._replace(name=change(theirs.name))
    return tuple(map(change, theirs))


def find(table: Table, path: str) -> tuple[Theirs, bool] | None:
    """Their name of a parameter of ours, and whether it is a kernel of a module."""
    if path in table:
        return table[path], False
    module, _, leaf = path.rpartition('/')
    if module not in table or leaf not in LEAVES:
        return None

    def join(name: str) -> str:  # in_proj_ of torch's MultiheadAttention has no dot
        return name + ('' if name.endswith('_') else '.') + LEAVES[leaf]

    return renamed(table[module], join), leaf == 'kernel'


def names_of(theirs: Theirs) -> tuple[str, ...]:
    if isinstance(theirs, (Part, Flat)):
        return (theirs.name,)
    return (theirs,) if isinstance(theirs, str) else theirs


class Report:
    """Gathers what of a file fits and what does not, over all towers, and says it at once."""

    def __init__(self, origin: str, family: str):
        self.origin, self.family = origin, family
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.used: set[str] = set()

    def read(
        self, table: Table, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Parameters of ours, by path, in float32.

        Args:
            table: of the family, expanded.
            tensors: of the file; read one by one.
            shapes: that ours must have.
        """
        out = {}
        for path, shape in shapes.items():
            found = find(table, path)
            if found is None:
                raise UserError(
                    f'{self.origin}: {self.family} encoders have nothing like {path!r} of this one.'
                )
            theirs, kernel = found
            gone = [name for name in names_of(theirs) if name not in tensors]
            self.missing += gone
            if gone:
                continue
            self.used |= set(names_of(theirs))
            x = to_ours([np.asarray(tensors[n], np.float32) for n in names_of(theirs)], found)
            # Theirs may have a convolution where ours is one product, and lack axes of length 1.
            alike = x.size == math.prod(shape) if kernel else x.squeeze().shape == _squeeze(shape)
            if x.ndim == len(shape) and kernel:
                alike = x.shape == shape
            if not alike:
                got = ' + '.join(f'{n} {list(np.shape(tensors[n]))}' for n in names_of(theirs))
                self.wrong.append(f'{got} for {path} {list(shape)}')
                continue
            out[path] = x.reshape(shape)
        return out

    def finish(self, unexpected: list[str]) -> None:
        """Raises UserError if anything was missing, unexpected or of the wrong shape."""
        found = {
            'missing': self.missing,
            'unexpected': unexpected,
            'of another shape': self.wrong,
        }
        if not any(found.values()):
            return
        lines = [f'{self.origin}: read as {self.family}, but']
        for what, names in found.items():
            if names:
                more = f', ... ({len(names)} in all)' if len(names) > LISTED else ''
                lines.append(f'  {what}: {", ".join(names[:LISTED])}{more}')
        raise UserError('\n'.join(lines))


def to_ours(arrays: list[np.ndarray], found: tuple[Theirs, bool]) -> np.ndarray:
    """Theirs as ours; a convolution still is one, where ours computes it as a product."""
    theirs, kernel = found
    x = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if isinstance(theirs, Part):
        x = x.reshape(theirs.count, -1, *x.shape[1:])[theirs.index]
    if kernel:
        x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    return x


def write(
    table: Table, params: Mapping[str, np.ndarray], patches: tuple[str, ...] = ('patch_embedding',)
) -> dict[str, np.ndarray]:
    """Theirs, by name, of all parameters of ours.

    Args:
        table: of the family, expanded.
        params: by path.
        patches: modules of ours that are one product, where theirs convolve images of 3 channels.

    Raises:
        UserError: a parameter that the family does not have.
    """
    out: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, x in params.items():
        found = find(table, path)
        if found is None:
            raise UserError(f'the format has nothing like the parameter {path!r} of this encoder.')
        theirs, kernel = found
        if kernel and path.rpartition('/')[0] in patches:
            side = math.isqrt(len(x) // 3)
            x = x.reshape(side, side, 3, -1)
        if kernel:
            x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
        if isinstance(theirs, Part):
            parts.setdefault(theirs.name, {})[theirs.index] = x
            continue
        if isinstance(theirs, Flat):
            x = x.reshape(_squeeze(x.shape))
        names = names_of(theirs)
        for name, y in (
            zip(names, np.split(x, len(names)), strict=True) if x.ndim else [(names[0], x)]
        ):
            out[name] = np.ascontiguousarray(y)
    for name, pieces in parts.items():
        out[name] = np.concatenate([pieces[i] for i in sorted(pieces)])
    return out


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def flatten(tree: Any, prefix: str = '') -> dict[str, np.ndarray]:
    """{'a': {'b': x}} -> {'a/b': x}, as NumPy arrays."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f'{prefix}{key}/')
        else:
            out[f'{prefix}{key}'] = np.asarray(value)
    return out


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, x in flat.items():
        *parents, leaf = path.split('/')
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = x
    return tree
