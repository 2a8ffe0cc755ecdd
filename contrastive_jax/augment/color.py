"""Operations on the colours of a pixel: jitter, grayscale, solarize.

Shapes: B batch, V views, C=3 channels, H W pixels, P = H * W, K operations.
Each function checks its options and returns the operation, see options.Apply.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax import config
from contrastive_jax.augment.options import Apply, Frame, chance, number

# ITU-R BT.601, as PIL and torchvision turn RGB into luma.
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)


def luma(x: jax.Array) -> jax.Array:
    """The luma of each pixel: [B, V, 3, ...] to [B, V, 1, ...]."""
    red, green, blue = (x[:, :, c : c + 1] for c in range(3))
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def spread(value_BV: jax.Array, x: jax.Array) -> jax.Array:
    """A number for each image, shaped to broadcast against x [B, V, ...]."""
    return value_BV.reshape(value_BV.shape + (1,) * (x.ndim - 2))


def grayscale(frame: Frame, *, prob: float | Sequence[float]) -> Apply:
    """The paper's colour drop: all channels become the luma (ITU-R BT.601).

    Args:
        frame: of the operation.
        prob: probability of an image, in [0, 1]; a number or one a view.
    """
    coin = chance(prob, frame)

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(spread(coin(draw), x), luma(x), x)

    return apply


def solarize(frame: Frame, *, prob: float | Sequence[float], threshold: float = 0.5) -> Apply:
    """Inverts the values that are not below the threshold, as PIL.ImageOps.solarize does.

    Args:
        frame: of the operation.
        prob: probability of an image, in [0, 1]; a number or one a view.
        threshold: in [0, 1]; 0.5 lies between 127/255 and 128/255, so it is PIL's 128.
    """
    coin = chance(prob, frame)
    threshold = number('threshold', threshold, frame, 0, 1)

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(spread(coin(draw), x) & (x >= threshold), 1 - x, x)

    return apply


def jitter(
    frame: Frame,
    *,
    prob: float | Sequence[float],
    brightness: float = 0.8,
    contrast: float = 0.8,
    saturation: float = 0.8,
    hue: float = 0.2,
    brightness_rule: str = 'multiplicative',
) -> Apply:
    """Colour jitter as torchvision's ColorJitter, in a random order that each image draws.

    Each of the four steps ends with a clip to [0, 1]. With a factor f ~ U[max(0, 1-s), 1+s]:
    brightness f * x; contrast f * x + (1-f) * mean luma of the image; saturation
    f * x + (1-f) * luma of the pixel. Hue turns the HSV hue by U[-hue, hue] of a full turn.
    A strength of 0 leaves a step out, at no cost. Defaults: SimCLR's strength 1.

    Paper (BYOL's JAX code): contrast about the mean of each channel; here about the mean luma,
    also with the additive rule, because all recipes then share one contrast.

    Args:
        frame: of the operation.
        prob: probability of an image, in [0, 1]; a number or one a view.
        brightness: strength s, at least 0.
        contrast: strength s, at least 0.
        saturation: strength s, at least 0.
        hue: half range of the turn, in [0, 0.5].
        brightness_rule: 'multiplicative' (torchvision), or 'additive' (BYOL's JAX code):
            x + U[-s, s].
    """
    coin = chance(prob, frame)
    rules = {'multiplicative': False, 'additive': True}
    where = f'{frame.where}.brightness_rule'
    additive = config.choose('brightness_rule', brightness_rule, rules, where)
    steps = {}
    for name, value in (
        ('brightness', brightness),
        ('contrast', contrast),
        ('saturation', saturation),
        ('hue', hue),
    ):
        strength = number(name, value, frame, 0, 0.5 if name == 'hue' else math.inf)
        signed = name == 'hue' or (name == 'brightness' and additive)
        if strength > 0:
            steps[name] = (-strength if signed else max(-1.0, -strength), strength)

    def apply(key: jax.Array, draw: jax.Array, x: jax.Array) -> jax.Array:
        on_BV = coin(draw)
        place_BVK = _ranks(draw[..., 1 : 1 + len(steps)])
        place, amount = {}, {}
        for k, (name, (low, high)) in enumerate(steps.items()):
            place[name] = place_BVK[..., k]
            amount[name] = jnp.where(on_BV, low + (high - low) * draw[..., 5 + k], 0.0)
        flat = x.reshape((*x.shape[:3], -1))
        return jitter_by(flat, place, amount, additive).reshape(x.shape)

    return apply


def jitter_by(
    x_BVCP: jax.Array,
    place: dict[str, jax.Array],
    amount: dict[str, jax.Array],
    additive: bool = False,
) -> jax.Array:
    """Colour jitter by given amounts in a given order.

    Each image needs an order of its own. The other three differ in two numbers only, so one
    formula does any of them; hue does not fit it and runs once, in the middle, with K-1 places
    before it and K-1 after for the others. A place that an image does not use changes nothing.
    (With both in each of K places, XLA would compute the one anew on a CPU for each channel that
    the other reads.)

    Args:
        x_BVCP: images in [0, 1].
        place: step name -> [B, V], the image's place for it, 0..K-1; of 'brightness', 'contrast',
            'saturation' and 'hue', those that are to run.
        amount: step name -> [B, V]; of the first three, factor - 1 (what to add, if additive); of
            hue, the turn in [-0.5, 0.5]. 0 leaves an image as it is.
        additive: whether brightness adds.
    """
    blends = [name for name in ('brightness', 'contrast', 'saturation') if name in place]

    def blend_at(x_BVCP: jax.Array, places: range, after_hue: bool) -> jax.Array:
        nothing = jnp.zeros(x_BVCP.shape[:2], x_BVCP.dtype)
        slots = []
        for slot in places:
            slots.append(dict.fromkeys(('brightness', 'contrast', 'saturation'), nothing))
            for name in blends:
                here = place[name] == slot
                if 'hue' in place:
                    here &= (place[name] > place['hue']) == after_hue
                slots[-1][name] = jnp.where(here, amount[name], nothing)
        if not blends or not slots:
            return x_BVCP
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *slots)

        def step(x: jax.Array, slot: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return _blend(x, **slot, additive=additive), None

        return jax.lax.scan(step, x_BVCP, stacked)[0]

    K = len(place)
    if 'hue' not in place:
        return blend_at(x_BVCP, range(K), True)
    x_BVCP = blend_at(x_BVCP, range(K - 1), False)
    x_BVCP = turn_hue(x_BVCP, amount['hue'])
    return blend_at(x_BVCP, range(1, K), True)


def _blend(
    x_BVCP: jax.Array,
    brightness: jax.Array,
    contrast: jax.Array,
    saturation: jax.Array,
    additive: bool,
) -> jax.Array:
    """The one of brightness, contrast and saturation whose amount [B, V] is not 0."""
    # A sum of three slices: XLA reduces over so short an axis slowly on a CPU.
    grey = luma(x_BVCP)
    gain = 1 + contrast + saturation
    offset = -spread(contrast, x_BVCP) * grey.mean(3, keepdims=True)
    if additive:
        offset += spread(brightness, x_BVCP)
    else:
        gain += brightness
    x_BVCP = x_BVCP * spread(gain, x_BVCP) + (grey * spread(-saturation, x_BVCP) + offset)
    return jnp.clip(x_BVCP, 0, 1)


def turn_hue(x_BVCP: jax.Array, turn_BV: jax.Array) -> jax.Array:
    """Turns the HSV hue, without a conversion to HSV and back.

    With V = max, chroma = max - min and hue h in sixths of a turn, a channel of the colour is
    V - chroma * clip(2 - |(h + n) mod 6 - 2|, 0, 1), n = 5, 3, 1 for red, green, blue.

    Args:
        x_BVCP: RGB in [0, 1].
        turn_BV: fraction of a full turn, in [-0.5, 0.5]; 0 returns the image's own bits.
    """
    red, green, blue = (x_BVCP[:, :, c : c + 1] for c in range(3))
    top = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = top - jnp.minimum(jnp.minimum(red, green), blue)
    is_red, is_green = top == red, top == green
    slope = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    base = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    # Grey has chroma 0 and any hue: the tiny number only avoids 0 / 0.
    hue = slope / jnp.maximum(chroma, 1e-12) + (base + 6 * spread(turn_BV, x_BVCP))
    hue = hue + np.asarray([5, 3, 1], np.float32).reshape((1, 1, 3, 1))
    hue = hue - 6 * jnp.floor(hue / 6)
    turned = top - chroma * jnp.clip(2 - jnp.abs(hue - 2), 0, 1)
    return jnp.where(spread(turn_BV, x_BVCP) == 0, x_BVCP, turned)


def _ranks(draw_BVK: jax.Array) -> jax.Array:
    """The place of each draw among the K of its image: a random permutation of 0..K-1."""
    mine, other = draw_BVK[..., :, None], draw_BVK[..., None, :]
    k = np.arange(draw_BVK.shape[-1])
    earlier = (k[None, :] < k[:, None])[None, None]
    return ((other < mine) | ((other == mine) & earlier)).sum(-1)
