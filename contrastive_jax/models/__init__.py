"""One file a model; each exports `make(*, remat, **options) -> flax.linen.Module`.

A model is called as `module(x_BHWC, train) -> (features_BD, intermediates)`: x in floats of any
range, features in float32, intermediates a dict of named float32 arrays. Parameters are float32
whatever the compute dtype. `init` and `apply` are all that the rest of the code needs of flax.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from contrastive_jax import parallel
from contrastive_jax.config import UserError


class Microbatched(NamedTuple):
    """An encoder that works on one part of the batch after another: exact gradient caching.

    The parts' features together are the batch's, so a loss on them sees every negative; the
    backward pass encodes each part again, so that the activations of one part are all that is held
    (GradCache, Gao et al. 2021, arXiv:2101.06983, here by `jax.checkpoint`). A part holds whole
    records: where rows are the views of images, all views of some images. What is drawn is drawn
    for each part from a key of its own.

    Gradients equal those of the whole batch, except through BatchNorm, which sees a part as if it
    were the batch: the part's mean and variance normalise its rows, over the views that the whole
    batch's would be over, and running averages take in the parts one after another, so that with n
    parts they forget n times as fast. Heads are no part of this and see the whole batch.
    """

    module: 'nn.Module | Pretrained'
    parts: int
    records: int = 0  # that the rows are of, as many of each; 0, or where they are not: a row each


class Pretrained(NamedTuple):
    """An encoder that starts from given weights instead of random ones."""

    module: nn.Module
    params: Any
    stats: Any
    origin: str  # for errors


Encoder = nn.Module | Microbatched | Pretrained


def init(module: Encoder, key: jax.Array, x: jax.Array, **inputs: Any) -> tuple[Any, Any]:
    """`(params, stats)` of a module.

    Args:
        module: the module.
        key: of the initial values.
        x: a batch of what it will see.
        **inputs: further arguments of its call. An optional one makes the parameters that only it
            needs: without a mask here, a ViT has no mask token.

    Returns:
        The trained parameters, and what is not trained: the running averages of BatchNorm and what
        is frozen at its initial value; {} without any.
    """
    if isinstance(module, Microbatched):
        module = module.module
    given = module if isinstance(module, Pretrained) else None
    plain: Any = given.module if given else module

    def start() -> Any:
        return plain.init(key, x, train=False, **inputs)

    variables = jax.eval_shape(start) if given else start()
    found = variables.get('params', {}), variables.get('batch_stats', {})
    return _given(given, *found) if given else found


def _given(given: Pretrained, params: Any, stats: Any) -> tuple[Any, Any]:
    """The given weights, if they are those that the module has by its shapes.

    Raises:
        UserError: they are not; the first differences are listed.
    """

    if differ := differences((params, stats), (given.params, given.stats)):
        raise UserError(
            f'config.init_from: the weights of {given.origin} do not fit this encoder; {differ}'
        )
    # What is frozen here and learned there, or the reverse, changes sides.
    found = _by_name((given.params, given.stats))

    def start(path: Any, _: Any) -> jax.Array:
        return jnp.asarray(found[_name(path)])

    return (
        jax.tree_util.tree_map_with_path(start, params),
        jax.tree_util.tree_map_with_path(start, stats),
    )


def differences(here: Sequence[Any], there: Sequence[Any]) -> str:
    """The arrays of some trees that have another shape in others, the first of them by name, or ''.

    Args:
        here, there: trees whose leaves are looked at together, such as parameters and averages.
    """
    ours = {name: x.shape for name, x in _by_name(here).items()}
    theirs = {name: x.shape for name, x in _by_name(there).items()}
    names = [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]
    listed = [
        f'\n  {n}: here {ours.get(n, "missing")}, there {theirs.get(n, "missing")}'
        for n in names[:5]
    ]
    return f'{len(names)} differ, first:{"".join(listed)}' if names else ''


def _by_name(trees: Sequence[Any]) -> dict[str, Any]:
    leaves = [leaf for tree in trees for leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return {_name(path): x for path, x in leaves}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def apply(
    module: Encoder,
    params: Any,
    stats: Any,
    x: jax.Array,
    train: bool,
    *,
    key: jax.Array | None = None,
    **inputs: Any,
) -> tuple[Any, Any]:
    """`(module(x, train, **inputs), new stats)`; with train=False, or no BatchNorm, stats as given.

    Args:
        module: the module.
        params, stats: from `init`.
        x: [B, ...].
        train: statistics of this batch, and random drops; else running averages, and no drops.
        key: of what the module draws in training (drop_path, drop_tokens); ignored if it draws
            nothing. None: nothing is drawn, and nothing is left out (a teacher).
        **inputs: further arguments of the module's call, trees of arrays [B, ...].
    """
    if isinstance(module, Microbatched):
        views = len(x) // module.records if module.records else 1
        views = views if views * module.records == len(x) else 1
        if module.parts > 1 and len(x) % (module.parts * views) == 0:
            return _by_parts(module, views, params, stats, x, train, key, inputs)
        module = module.module
    if isinstance(module, Pretrained):
        module = module.module
    variables = {'params': params, 'batch_stats': stats} if stats else {'params': params}
    rngs = None if key is None else {'drop': key}
    if not (stats and train):
        return module.apply(variables, x, train=train, rngs=rngs, **inputs), stats
    outputs, new = module.apply(
        variables, x, train=True, rngs=rngs, mutable=['batch_stats'], **inputs
    )
    return outputs, new['batch_stats']


def _by_parts(
    cut: Microbatched,
    views: int,
    params: Any,
    stats: Any,
    x: jax.Array,
    train: bool,
    key: jax.Array | None,
    inputs: dict[str, Any],
) -> tuple[Any, Any]:
    rows = parallel.split_rows((x, inputs), cut.parts, views)
    keys = None if key is None else jax.random.split(key, cut.parts)

    @jax.checkpoint
    def encode(stats: Any, part: tuple[Any, jax.Array | None]) -> tuple[Any, Any]:
        (x, inputs), key = part
        outputs, stats = apply(cut.module, params, stats, x, train=train, key=key, **inputs)
        return stats, outputs

    stats, outputs = jax.lax.scan(encode, stats, (rows, keys))
    return parallel.join_rows(outputs, views), stats
