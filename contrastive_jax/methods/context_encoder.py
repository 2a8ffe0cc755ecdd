"""Context encoders (Pathak et al. 2016, https://arxiv.org/abs/1604.07379): filling holes.

An encoder sees an image with a hole, a decoder paints what was there, and a critic, which sees
either the painted or the true hole and nothing around it, says which of them it saw. Each of them
learns at a rate of its own (`config.optim.modules`) from one loss, in which `stop_gradient` says
who hears which term. Evaluators see the encoder, on whole images.

Dimension key: B batch, H W image, C channels, S side of the window that is painted, N places of the
encoder's map, D its channels.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.lax import stop_gradient as stop

from contrastive_jax import models
from contrastive_jax.augment.masking import block_mask, image_key, widened
from contrastive_jax.config import UserError, check_range, choose, each
from contrastive_jax.layers.painter import Critic, Painter, places
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, seen

MASKS = 'centre', 'blocks'
CELLS = 16  # rows and columns of cells that blocks consist of, or the next number that divides
SHARE = 0.25  # of them that are hidden
LEAST = 64  # a block is no smaller than the image over this
BORDER = 10.0  # times what a pixel of the border counts


def make(
    model: models.Encoder,
    *,
    mask: str = 'centre',
    overlap: int = 4,
    adversary: float = 0.001,
    width: int = 64,
    bottleneck: int = 0,
    colour: Sequence[float] = (117.0, 104.0, 123.0),
) -> Method:
    """A context encoder, on every view of every image; with views whose values are in [−1, 1].

    That is `config.inputs.mean` and `std` of 0.5 each, because the decoder ends in tanh.

    BatchNorm takes its statistics of all views together, in the encoder of images with holes, whose
    averages evaluators use on whole ones; the critic's of true and of painted holes each by itself,
    as in the authors' code. Authors' code: the critic takes its step before its gradient on painted
    holes is taken; here: both at once, because there is one backward pass.

    Beside the encoder's outputs evaluators can have 'filled' [B, H, W, C], images whose holes are
    painted, and 'hidden' [B, H, W, 1], 1 where they are. There an image's mask depends on the image
    alone.

    Args:
        model: the encoder; gives 'map' [B, h, w, D] or 'patches' [B, N, D].
        mask: 'centre', a square of half of the image's side; or 'blocks', random rectangles that
            cover a quarter of it.
        overlap: pixels along the hole's edge that are painted although they are seen, and count
            ten times, against seams. Of the centre they are the outermost ones inside of the
            square, of blocks those around them.
        adversary: weight of what the critic says, in [0, 1), of the squared error the rest. 0:
            there is no critic.
        width: channels of the decoder's and of the critic's largest map; their smaller ones have up
            to eight times as many.
        bottleneck: numbers between encoder and decoder, 4,000 in the authors' code; 0: a fully
            connected layer of each channel by itself, as in the paper.
        colour: of hidden pixels in the encoder's input, in [0, 255].
    """
    who = 'context_encoder'
    choose('mask', mask, dict.fromkeys(MASKS), 'config.method')
    sizes = {'overlap': overlap, 'bottleneck': bottleneck}
    check_range('config.method', sizes, least=0, whole=True, who=who)
    check_range('config.method', {'width': width}, least=1, whole=True, who=who)
    check_range('config.method', {'adversary': adversary}, least=0, below=1, who=who)
    check_range('config.method', each('colour', colour), least=0, most=255, who=who)
    network = Chain(model)
    empty = jnp.asarray(colour, jnp.float32).reshape(1, 1, 1, -1) / 127.5 - 1
    judge = Critic(width)

    def window(x_BHW: jax.Array) -> jax.Array:
        """The part of images or masks that is painted: the centre, or all of it."""
        quarter = x_BHW.shape[1] // 4 if mask == 'centre' else 0
        return x_BHW[:, quarter : x_BHW.shape[1] - quarter, quarter : x_BHW.shape[2] - quarter]

    def holes(keys: jax.Array, images: jax.Array) -> jax.Array:
        """Hidden pixels, bool [B, H, W], one key an image."""
        side = check_sides(images, mask, overlap)
        if mask == 'centre':
            at = jnp.arange(side)
            inside = (at >= side // 4 + overlap) & (at < side - side // 4 - overlap)
            square = inside[None, :, None] & inside[None, None, :]
            return jnp.broadcast_to(square, images.shape[:3])
        cell = math.gcd(side, max(1, side // CELLS))
        n = side // cell
        size = {'rows': n, 'columns': n, 'min_patches': max(1, n**2 // LEAST)}
        draw = partial(block_mask, batch=1, ratio=SHARE, prob=1.0, **size)
        cells = jax.vmap(draw)(keys).reshape(-1, n, n)
        return cells.repeat(cell, axis=1).repeat(cell, axis=2)

    def paint(
        params: Tree,
        stats: Tree,
        images: jax.Array,
        hidden_BHW: jax.Array,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """The window as painted [B, S, S, C], and the averages of encoder and decoder."""
        shown = jnp.where(hidden_BHW[..., None], empty, images)
        out, new = network(params, stats, shown, train=train, key=key)
        args = params['decoder'], stats['decoder'], places(out['named'])
        painted, new['decoder'] = models.apply(painter(images), *args, train)
        return painted, new

    def painter(images: jax.Array) -> Painter:
        shape = jax.eval_shape(window, images).shape
        return Painter(shape[1], shape[3], width, bottleneck)

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        images = batch['views'][:, 0]
        check_sides(images, mask, overlap)
        keys = jax.random.split(key, 3)
        params, stats = network.init(keys[0], images)
        named = network.features(params, stats, images)
        start = models.init(painter(images), keys[1], places(named))
        params['decoder'], stats['decoder'] = start
        if adversary:
            params['critic'], stats['critic'] = models.init(judge, keys[2], window(images))
        return params, {'stats': stats}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        mask_key, key = jax.random.split(key)
        images = rearrange(batch['views'], 'b v h w c -> (b v) h w c')
        hidden_BHW = holes(jax.random.split(mask_key, len(images)), images)
        painted, stats = paint(params, extra['stats'], images, hidden_BHW, True, key)
        true = window(images)
        hidden_BSS = window(hidden_BHW)[..., None]
        asked_BSS = window(widened(hidden_BHW, overlap))[..., None]
        weight_BSS = jnp.where(hidden_BSS, 1.0, jnp.where(asked_BSS, BORDER, 0.0))
        error = jnp.sum(weight_BSS * (painted - true) ** 2)
        value = error / (jnp.sum(asked_BSS) * true.shape[3])
        metrics = {'reconstruction': value}
        if not adversary:
            return value, Aux({'stats': stats}, metrics)

        def verdict(critic: Tree, averages: Tree, x: jax.Array) -> tuple[jax.Array, Tree]:
            return models.apply(judge, critic, averages, jnp.where(asked_BSS, x, 0.0), True)

        of_true, averages = verdict(params['critic'], extra['stats']['critic'], true)
        of_painted, stats['critic'] = verdict(params['critic'], averages, stop(painted))
        heard, _ = verdict(stop(params['critic']), averages, painted)
        criticism = cross_entropy(of_true, 1.0) + cross_entropy(of_painted, 0.0)
        fooling = cross_entropy(heard, 1.0)
        value = (1 - adversary) * value + adversary * fooling + criticism
        right = (jnp.mean(of_true > 0) + jnp.mean(of_painted < 0)) / 2
        metrics |= {'critic': criticism, 'fooling': fooling, 'critic_accuracy': right}
        return value, Aux({'stats': stats}, metrics)

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        images = seen(batch)
        found = network.features(params, extra['stats'], images)
        hidden_BHW = holes(jax.vmap(image_key)(images), images)
        painted, _ = paint(params, extra['stats'], images, hidden_BHW, False)
        edge = (images.shape[1] - painted.shape[1]) // 2
        painted = jnp.pad(painted, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        filled = jnp.where(hidden_BHW[..., None], painted, images)
        return {**found, 'filled': filled, 'hidden': hidden_BHW[..., None].astype(jnp.float32)}

    return Method(init, loss, encode)


def cross_entropy(logits_B: jax.Array, label: float) -> jax.Array:
    """Mean binary cross-entropy with one label, 1 for true ones."""
    labels_B = jnp.full_like(logits_B, label)
    return optax.sigmoid_binary_cross_entropy(logits_B, labels_B).mean()


def check_sides(images: jax.Array, mask: str, overlap: int) -> int:
    """The side of square images; a UserError if holes do not fit into them."""
    rows, columns = images.shape[1:3]
    if rows != columns or rows % 4:
        raise UserError(
            f'config.inputs: got images of {rows} × {columns}; context_encoder needs square ones '
            'whose side is a multiple of 4.'
        )
    if mask == 'centre' and overlap >= rows // 4:
        raise UserError(
            f'config.method.overlap: got {overlap}, which leaves nothing hidden of the {rows // 2} '
            'pixels of the centre.'
        )
    return rows
