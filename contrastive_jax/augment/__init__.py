"""Image augmentation on the device: batched, jitted, each image with its own random draw.

Crop and flip happen on the host, where the original resolution is; the other eight of SimCLR's
augmentations happen here (Chen et al. 2020, figure 4, and BYOL's solarize). Every image of every
view draws its own parameters, from the key alone: an operation's draw depends neither on which
other operations the spec names nor on how the batch is sharded.

Shapes: B batch, V views (or L local ones), C=3 channels, H=W=S side. Between the operations images
are float32 [B, V, C, H, W] in [0, 1]: with a channel's pixels side by side the CPU's loops
vectorise, and without a merge of B and V the batch axis keeps its sharding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax import config
from contrastive_jax.augment import color, filters, geometry
from contrastive_jax.augment.options import Frame

# The one order in which operations are applied: a spec comes from a ConfigDict, which sorts its
# keys. The order is part of what a key means: inserting an operation changes the draws after it.
ORDER = {
    'rotate90': geometry.rotate90,
    'jitter': color.jitter,
    'grayscale': color.grayscale,
    'cutout': geometry.cutout,
    'noise': filters.noise,
    'blur': filters.blur,
    'sobel': filters.sobel,
    'solarize': color.solarize,
}
# Uniform numbers for each operation, image and view: jitter's coin, four places, four amounts.
DRAWS = 9


def make(
    spec: Mapping[str, Mapping[str, Any]],
    *,
    views: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    local_views: int = 0,
    local_size: int = 96,
    where: str = 'config.inputs.augment',
) -> Callable[[jax.Array, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """The augmentation that `spec` describes, as a pure function to call within the jitted step.

    Operations are applied in the order rotate90, jitter, grayscale, cutout, noise, blur, sobel,
    solarize, whatever the order of `spec`; one that `spec` does not name costs nothing. Each has
    an option `prob`, the probability that it is applied to an image: a number for all views or a
    tuple with one for each (BYOL's asymmetric pair) and, where there are local views, a last one
    for all of these (DINO's blur: (1.0, 0.1, 0.5)). The other options are the keywords of the
    function of that name in `color`, `filters` and `geometry`.

    Args:
        spec: operation name -> options, e.g. {'jitter': {'prob': 0.8, 'hue': 0.2},
            'blur': {'prob': (1.0, 0.1)}}.
        views: V, the number of views in a batch.
        image_size: S, the side of the (square) views in pixels.
        mean: of each channel, in units of [0, 1]; subtracted after the operations.
        std: of each channel, in units of [0, 1]; divided by after the operations.
        local_views: L, the number of local views in a batch. They have draws of their own: those of
            the other views do not depend on L.
        local_size: the side of these in pixels.
        where: the config key that `spec` came from, for errors.

    Returns:
        augment(key, batch) -> batch, in which 'views' [B, V, S, S, 3] uint8 and, with L > 0,
        'local_views' [B, L, local_size, local_size, 3] uint8 have become float32, normalised.

    Raises:
        UserError: unknown operation or option, or an option out of its range.
    """
    _check_mean_and_std(mean, std)
    config.check_range('config.inputs', {'local_views': local_views}, least=0, whole=True)
    config.check_range('config.inputs', {'local_size': local_size}, least=1, whole=True)
    for name in spec:
        if name not in ORDER:
            raise config.unknown('augmentation', name, ORDER, where)
    frame = Frame(where, views, image_size, local_views)
    parts = {'views': _one(spec, frame, views, mean, std)}
    if local_views:
        frame = frame._replace(size=local_size, local=True)
        parts['local_views'] = _one(spec, frame, local_views, mean, std)

    def augment(key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        # Not 0 or 1: fold_in makes of them the two keys that the views' own draws split off.
        keys = {'views': key, 'local_views': jax.random.fold_in(key, 2)}
        return {**batch, **{name: part(keys[name], batch[name]) for name, part in parts.items()}}

    return augment


def _one(
    spec: Mapping[str, Mapping[str, Any]],
    frame: Frame,
    views: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(key, uint8 [B, views, size, size, 3]) -> float32: `make` for one of the batch's arrays."""
    operations = []
    for index, (name, factory) in enumerate(ORDER.items()):
        if name not in spec:
            continue
        here = f'{frame.where}.{name}'
        if not hasattr(spec[name], 'items'):
            raise config.UserError(
                f'{here}: expected options such as dict(prob=0.5), got {spec[name]!r}.'
            )
        at = frame._replace(where=here)
        operations.append((index, config.call(factory, here, at, **spec[name])))

    def one(key: jax.Array, views_BVHWC: jax.Array) -> jax.Array:
        expected = (views, frame.size, frame.size, 3)
        if views_BVHWC.shape[1:] != expected or views_BVHWC.dtype != jnp.uint8:
            got = f'{views_BVHWC.dtype}{list(views_BVHWC.shape)}'
            raise config.UserError(
                f'{frame.where}: expected views uint8{["B", *expected]}, got {got}.'
            )
        x_BVCHW = jnp.moveaxis(views_BVHWC, 4, 2).astype(jnp.float32) / 255
        # One draw for all operations, and of two axes: on a CPU, XLA takes longer to compile a draw
        # with every axis.
        draw_key, noise_key = jax.random.split(key)
        draws = jax.random.uniform(draw_key, (len(x_BVCHW), views * len(ORDER) * DRAWS))
        draws = draws.reshape((len(x_BVCHW), views, len(ORDER), DRAWS))
        for index, operation in operations:
            x_BVCHW = operation(noise_key, draws[:, :, index], x_BVCHW)
        return _standardise(jnp.moveaxis(x_BVCHW, 2, 4), mean, std)

    return one


def normalize(
    images: jax.Array | np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """Standardises images as evaluators see them: uint8 to float32 (x / 255 - mean) / std.

    Args:
        images: [..., H, W, 3] uint8.
        mean: of each channel, in units of [0, 1].
        std: of each channel, in units of [0, 1].
    """
    _check_mean_and_std(mean, std)
    return _standardise(jnp.asarray(images).astype(jnp.float32) / 255, mean, std)


def _standardise(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    shape = (1,) * (x.ndim - 1) + (3,)
    mean_, std_ = (np.asarray(m, np.float32).reshape(shape) for m in (mean, std))
    return (x - mean_) / std_


def _check_mean_and_std(mean: Sequence[float], std: Sequence[float]) -> None:
    for name, value in (('mean', mean), ('std', std)):
        if np.shape(value) != (3,) or not np.all(np.isfinite(np.asarray(value, np.float32))):
            raise config.UserError(f'{name}: expected one number a channel (3), got {value!r}.')
    if not np.all(np.asarray(std, np.float32) > 0):
        raise config.UserError(f'std: expected numbers above 0, got {std!r}.')
