"""Named modules in a row: what most methods train is an encoder, a projector and maybe a predictor.

Dimension key: B batch, V views, H W image, D outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.inputs import INDEX
from contrastive_jax.method import Batch, Tree


class Chain:
    """The encoder and the heads after it, each on the output of the one before.

    Parameters and BatchNorm averages are dicts by module name.

    Args:
        encoder: of images, or of whatever the batch holds.
        apart: whose statistics BatchNorm takes of several views, over the global batch: of each
            view by itself (True), as where the authors' code has a call for each, or of all
            together (False), as in SimCLR's.
        **heads: in their order, by name.
    """

    def __init__(self, encoder: models.Encoder, *, apart: bool = False, **heads: Any):
        self.encoder, self.apart, self.heads = encoder, apart, heads

    def init(self, key: jax.Array, images_BHWC: jax.Array, **inputs: Any) -> tuple[Tree, Tree]:
        """`(params, stats)`; inputs are the encoder's other ones."""
        keys = iter(jax.random.split(key, 1 + len(self.heads)))
        params, stats = {}, {}
        params['encoder'], stats['encoder'] = models.init(
            self.encoder, next(keys), images_BHWC, **inputs
        )
        x_BD = self.features(params, stats, images_BHWC)['features']
        for name, head in self.heads.items():
            params[name], stats[name] = models.init(head, next(keys), x_BD)
            x_BD, _ = models.apply(head, params[name], stats[name], x_BD, train=False)
        return params, stats

    def start(self, key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        """`Method.init` of a method whose `extra` holds this network's averages alone, 'stats'."""
        del records
        params, stats = self.init(key, batch['views'][:, 0])
        return params, {'stats': stats}

    def __call__(
        self,
        params: Tree,
        stats: Tree,
        images_BHWC: jax.Array,
        *,
        train: bool = True,
        key: jax.Array | None = None,
        views: int = 1,
        **inputs: Any,
    ) -> tuple[dict[str, Any], Tree]:
        """Runs the heads that params hold.

        Args:
            params, stats: those of `init`, or of its first modules alone.
            images_BHWC: float, normalised.
            train: BatchNorm by the batch's statistics, not by the averages; stochastic depth.
            key: for what the encoder draws.
            views: V where the rows are (b v) and BatchNorm takes each view by itself.
            **inputs: the encoder's other ones.

        Returns:
            The output of every module by its name, the encoder's intermediates as 'named', and the
            averages after this call.
        """

        def run(name: str, module: Any, x: jax.Array, **options: Any) -> Any:
            options |= {'train': train}
            each = views if train and stats[name] else 1
            return _view_by_view(module, params[name], stats[name], x, each, **options)

        (x_BD, named), encoder_stats = run('encoder', self.encoder, images_BHWC, key=key, **inputs)
        outputs, new = {'encoder': x_BD, 'named': named}, {'encoder': encoder_stats}
        for name, head in self.heads.items():
            if name in params:
                x_BD, new[name] = run(name, head, x_BD)
                outputs[name] = x_BD
        return outputs, new

    def views(
        self, params: Tree, stats: Tree, views_BVHWC: jax.Array, **options: Any
    ) -> tuple[dict[str, Any], Tree]:
        """As a call, of all views: the outputs lead with [B, V]."""
        V = views_BVHWC.shape[1]
        # (b v): the views of one image stay on one device.
        images = rearrange(views_BVHWC, 'b v ... -> (b v) ...')
        outputs, stats = self(params, stats, images, views=V if self.apart else 1, **options)
        outputs = jax.tree.map(lambda x: x.reshape(-1, V, *x.shape[1:]), outputs)
        return outputs, stats

    def features(self, params: Tree, stats: Tree, images_BHWC: jax.Array) -> dict[str, jax.Array]:
        """The encoder's features and intermediates, as evaluators see them."""
        (features, named), _ = models.apply(
            self.encoder, params['encoder'], stats['encoder'], images_BHWC, train=False
        )
        return {'features': features, **named}

    def encode(self, params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        """`Method.encode` of a method whose `extra` holds this network's averages as 'stats'."""
        return self.features(params, extra['stats'], seen(batch))


def _view_by_view(
    module: Any,
    params: Tree,
    stats: Tree,
    x: jax.Array,
    views: int,
    *,
    train: bool,
    key: jax.Array | None = None,
    **inputs: Any,
) -> tuple[Any, Tree]:
    """`models.apply` to each of the views in rows (b v); averages go from one view to the next."""
    if views == 1:
        return models.apply(module, params, stats, x, train, key=key, **inputs)
    x_BV, inputs_BV = jax.tree.map(lambda x: x.reshape(-1, views, *x.shape[1:]), (x, inputs))
    keys = [None] * views if key is None else jax.random.split(key, views)
    found = []
    for v in range(views):
        rows, more = jax.tree.map(lambda x, v=v: x[:, v], (x_BV, inputs_BV))
        outputs, stats = models.apply(module, params, stats, rows, train, key=keys[v], **more)
        found.append(outputs)

    def rows_of(*views: jax.Array) -> jax.Array:
        return jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:])

    return jax.tree.map(rows_of, *found), stats


def seen(batch: Batch) -> jax.Array:
    """The array that an encoder is shown of an evaluation batch: images, waves."""
    (x,) = (x for name, x in batch.items() if name != INDEX)
    return x


def check_views(method: str, views_BVHWC: jax.Array, count: int) -> None:
    """Raises UserError unless there are `count` views of every image."""
    if views_BVHWC.shape[1] != count:
        raise UserError(
            f'config.inputs.views: got {views_BVHWC.shape[1]}; {method} needs {count} an image.'
        )


def join_crops(
    method: str,
    network: Chain,
    params: Tree,
    stats: Tree,
    batch: Batch,
    key: jax.Array,
    **inputs: Any,
) -> tuple[dict[str, Any], Tree]:
    """A network's outputs of the two global views and, behind them, of the local ones.

    Args:
        method: the name for errors.
        network, params, stats: see `Chain`.
        batch: 'views' and maybe 'local_views'.
        key: for what the encoder draws.
        **inputs: the encoder's, with the global views alone.

    Returns:
        Outputs [B, V + L, ...] of encoder and heads; 'named' is the global views' alone. BatchNorm
        sees each size of crop by itself.
    """
    check_views(method, batch['views'], 2)
    keys = jax.random.split(key)
    out, stats = network.views(params, stats, batch['views'], key=keys[0], **inputs)
    if 'local_views' in batch:
        local, stats = network.views(params, stats, batch['local_views'], key=keys[1])
        for name in out.keys() - {'named'}:
            out[name] = jnp.concatenate([out[name], local[name]], axis=1)
    return out, stats


def hold(tree: Tree, when: jax.Array) -> Tree:
    """The same values, without a gradient where `when` holds."""
    return jax.tree.map(lambda x: jnp.where(when, jax.lax.stop_gradient(x), x), tree)
