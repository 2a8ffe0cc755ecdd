"""Named modules in a row: what most methods train is an encoder, a projector and maybe a predictor.

Dimension key: B batch, V views, H W image, D outputs.
"""

import math
from collections.abc import Sequence
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
        (x_BD, named), encoder_stats = _view_by_view(
            *(self.encoder, params['encoder'], stats['encoder'], images_BHWC, train, views),
            **{'key': key, **inputs},
        )
        outputs, new = self.top(params, stats, x_BD, train, views)
        return {**outputs, 'encoder': x_BD, 'named': named}, {**new, 'encoder': encoder_stats}

    def top(
        self, params: Tree, stats: Tree, x_BD: jax.Array, train: bool = True, views: int = 1
    ) -> tuple[dict[str, jax.Array], Tree]:
        """The outputs of the heads that params hold, on an encoder's, and their averages."""
        outputs, new = {}, {}
        for name, head in self.heads.items():
            if name in params:
                x_BD, new[name] = _view_by_view(head, params[name], stats[name], x_BD, train, views)
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
    train: bool,
    views: int,
    key: jax.Array | None = None,
    **inputs: Any,
) -> tuple[Any, Tree]:
    """`models.apply` to each of the views in rows (b v); averages go from one view to the next.

    A module without BatchNorm, and one that takes its averages, is called once, on all rows.
    """
    if views == 1 or not (train and stats):
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


def count_patches(
    method: str, encoder: models.Encoder, images_BHWC: jax.Array, needs: Sequence[str]
) -> int:
    """N, the patches that an encoder gives of an image.

    Args:
        method: the name for errors.
        encoder: a ViT.
        images_BHWC: what it will see.
        needs: outputs that it must have, 'patches' among them.

    Raises:
        UserError: it lacks one of them.
    """

    def run(images: jax.Array) -> dict[str, jax.Array]:
        params, stats = models.init(encoder, jax.random.key(0), images)
        return models.apply(encoder, params, stats, images, train=False)[0][1]

    named = jax.eval_shape(run, images_BHWC)
    if not set(needs) <= set(named):
        raise UserError(
            f'config.model: {method} needs a ViT that gives {" and ".join(map(repr, needs))} '
            f"(pool='cls', or cls_token=True); this one's outputs are {tuple(named)}."
        )
    return named['patches'].shape[1]


def patch_grid(method: str, encoder: models.Encoder, images_BHWC: jax.Array) -> tuple[int, int]:
    """Rows and columns of an encoder's square patches; see `count_patches`."""
    N = count_patches(method, encoder, images_BHWC[:1], ('patches',))
    height, wide = images_BHWC.shape[1:3]
    side = round(math.sqrt(height * wide / N))
    return height // side, wide // side


def join_crops(
    method: str,
    network: Chain,
    params: Tree,
    stats: Tree,
    batch: Batch,
    key: jax.Array,
    count: int | None = 2,
    **inputs: Any,
) -> tuple[dict[str, Any], Tree]:
    """A network's outputs of the global views and, behind them, of the local ones.

    Args:
        method: the name for errors.
        network, params, stats: see `Chain`.
        batch: 'views' and maybe 'local_views'.
        key: for what the encoder draws.
        count: of the global views that the method needs; None: any.
        **inputs: the encoder's, with the global views alone.

    Returns:
        Outputs [B, V + L, ...] of encoder and heads; 'named' is the global views' alone. The
        encoder's BatchNorm sees each size of crop by itself, that of the heads all crops together,
        as in the code of SwAV and DINO.
    """
    if count is not None:
        check_views(method, batch['views'], count)
    keys = jax.random.split(key)
    encoder = {'encoder': params['encoder']}
    out, new = network.views(encoder, stats, batch['views'], key=keys[0], **inputs)
    if 'local_views' in batch:
        local, new = network.views(encoder, new, batch['local_views'], key=keys[1])
        out['encoder'] = jnp.concatenate([out['encoder'], local['encoder']], axis=1)
    V = out['encoder'].shape[1]
    flat = rearrange(out['encoder'], 'b v d -> (b v) d')
    heads, of_heads = network.top(params, stats, flat)
    heads = {name: rearrange(x, '(b v) k -> b v k', v=V) for name, x in heads.items()}
    return {**out, **heads}, {**new, **of_heads}
