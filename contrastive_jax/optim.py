"""Optimisers and the schedules of learning rate and weight decay, from optax."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_jax.config import UserError, check_range, choose, unknown

Decay = float | optax.Schedule

WHERE = 'config.optim'
# Keys of every optimiser, and those of all modules together.
SHARED = (
    *('learning_rate', 'scaling', 'weight_decay', 'final_weight_decay', 'warmup', 'final_fraction'),
)
WHOLE = ('layer_decay', 'clip_norm', 'modules')
SHARES = ('momentum', 'b1', 'b2')  # options from 0 to 1
OTHERS = '*'  # in the partition: the modules that are not named
SCALINGS: Mapping[str, Callable[[int], float]] = {  # of the learning rate, by the batch size
    'linear': lambda batch_size: batch_size / 256,  # Goyal et al. 2017, arXiv:1706.02677
    'sqrt': lambda batch_size: math.sqrt(batch_size / 1024),  # DINOv2
}
BLOCK = re.compile(r'(?:stage(\d+)_)?block(\d+)')
BEFORE_BLOCKS = re.compile(r'stem.*|(?:.*_)?(?:embedding|token)')


def decayed(params: Any) -> Any:
    """True for each parameter that takes weight decay: the kernels.

    Not decayed are all with fewer than two dimensions, leading ones of size 1 not counted (biases,
    scales and offsets of norms, CLS and mask tokens, temperatures), and position embeddings.

    Args:
        params: a tree of arrays.

    Returns:
        A tree of bools of the same structure.
    """

    def rule(path: tuple, x: jax.Array) -> bool:
        shape = list(x.shape)
        while shape and shape[0] == 1:
            shape.pop(0)
        return len(shape) >= 2 and getattr(path[-1], 'key', '') != 'position_embedding'

    return jax.tree_util.tree_map_with_path(rule, params)


def layer_factors(params: Any, decay: float) -> Any:
    """What layer-wise decay multiplies the learning rate of each parameter by.

    A module whose parts are named block0, block1, ... (or stage1_block0, ...) has layers: in a
    stack of L blocks the last one has decay, the first one decay^L, and what lies before them in
    the same module (stem..., ..._embedding, ..._token) decay^(L + 1). All else is after the
    blocks, or has none, and keeps its rate.

    Args:
        params: a tree of arrays.
        decay: in [0, 1].

    Returns:
        A tree of floats of the same structure.

    Raises:
        UserError: no blocks are found.

    Source: BEiT (Bao et al. 2022, arXiv:2106.08254) after ELECTRA (Clark et al. 2020); DINOv2.
    """

    def names(path: tuple) -> tuple[str, ...]:
        return tuple(str(getattr(entry, 'key', entry)) for entry in path)

    def place(name: str) -> tuple[int, int] | None:
        match = BLOCK.fullmatch(name)
        return (int(match[1] or 0), int(match[2])) if match else None

    stacks: dict[tuple[str, ...], set[tuple[int, int]]] = {}  # module -> its blocks
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        parts = names(path)
        for i, name in enumerate(parts):
            if block := place(name):
                stacks.setdefault(parts[:i], set()).add(block)
    if not stacks:
        raise UserError(f'{WHERE}.layer_decay: got {decay}, but the parameters have no blocks.')

    def factor(path: tuple, _: Any) -> float:
        parts = names(path)
        for i, name in enumerate(parts):
            blocks = sorted(stacks.get(parts[:i], ()))
            if blocks and (block := place(name)):
                return decay ** (len(blocks) - blocks.index(block))
            if blocks and BEFORE_BLOCKS.fullmatch(name):
                return decay ** (len(blocks) + 1)
        return 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def _scale_layers(decay: float) -> optax.GradientTransformation:
    """Multiplies every update, weight decay included, by its parameter's `layer_factors`."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u, factor: u * factor, updates, layer_factors(updates, decay))

    return optax.stateless(scale)


def cosine_between(start: float, end: float, total_steps: int) -> optax.Schedule:
    """Half a cosine from `start` at step 0 to `end` at `total_steps`; it stays there.

    DINO's weight decay (Caron et al. 2021, arXiv:2104.14294): from 0.04 to 0.4.
    """

    def schedule(step: Any) -> jax.Array:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / total_steps, 0.0, 1.0)
        return end + (start - end) * (1.0 + jnp.cos(jnp.pi * progress)) / 2.0

    return schedule


def warmup_cosine(
    peak: float, total_steps: int, warmup: float = 0.0, final_fraction: float = 0.0
) -> optax.Schedule:
    """Linear from 0 to `peak`, then half a cosine down to `final_fraction * peak`.

    Args:
        peak: the highest learning rate.
        total_steps: the step at which the end value is reached; it stays there.
        warmup: fraction of total_steps in [0, 1], rounded to a whole number of steps; the step
            after them (the first one, without warm-up) has the peak.
        final_fraction: in [0, 1]: 0 for SimCLR, 0.001 for Barlow Twins.

    Source: Goyal et al. 2017, arXiv:1706.02677 (warm-up); Loshchilov and Hutter 2017,
    arXiv:1608.03983 (cosine).
    """
    rise = round(warmup * total_steps)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - rise) / max(total_steps - rise, 1), 0.0, 1.0)
        cosine = (1.0 + jnp.cos(jnp.pi * progress)) / 2.0
        fall = final_fraction + (1.0 - final_fraction) * cosine
        return peak * jnp.where(step < rise, step / max(rise, 1), fall)

    return schedule


def _adamw(
    rate: optax.Schedule,
    weight_decay: Decay,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW, decay decoupled and times the rate (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)


def _sgd(
    rate: optax.Schedule, weight_decay: Decay, momentum: float = 0.9
) -> optax.GradientTransformation:
    """SGD with heavy-ball momentum and L2 decay added to the gradient, as torch's."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed), optax.sgd(rate, momentum=momentum)
    )


def _lars(
    rate: optax.Schedule,
    weight_decay: Decay,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """LARS (You et al. 2017, arXiv:1708.03888), biases and norms by plain SGD as in SimCLR."""
    return optax.lars(
        rate,
        weight_decay=weight_decay,
        weight_decay_mask=decayed,
        trust_coefficient=trust_coefficient,
        trust_ratio_mask=decayed,
        momentum=momentum,
    )


def _lamb(
    rate: optax.Schedule,
    weight_decay: Decay,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, arXiv:1904.00962), biases and norms by plain Adam.

    Paper: a trust ratio for every parameter; here: for the decayed ones only, because a
    bias that starts at 0 could only grow by a factor of 1 + rate a step. So this is `optax.lamb`
    with its trust ratio masked, which it has no option for.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.masked(optax.scale_by_trust_ratio(), decayed),
        optax.scale_by_learning_rate(rate),
    )


OPTIMISERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    'adamw': _adamw,
    'sgd': _sgd,
    'lars': _lars,
    'lamb': _lamb,
}


def _one(
    where: str,
    total_steps: int,
    batch_size: int,
    /,
    *,
    name: str,
    learning_rate: float,
    scaling: str,
    weight_decay: float,
    final_weight_decay: float | None,
    warmup: float,
    final_fraction: float,
    **options: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of parameters that share all of these: see `make`."""
    optimiser = choose('optimiser', name, OPTIMISERS, where)
    own = list(inspect.signature(optimiser).parameters)[2:]
    for key in options:
        if key not in own:
            settable = [*own, *SHARED, *(WHOLE if where == WHERE else ())]
            raise unknown(f'key for {name}', key, settable, where)
    scale = choose('scaling', scaling, SCALINGS, where)
    numbers = {'learning_rate': learning_rate, 'weight_decay': weight_decay}
    if final_weight_decay is not None:
        numbers['final_weight_decay'] = final_weight_decay
    shares = {'warmup': warmup, 'final_fraction': final_fraction}
    for key, value in options.items():
        (shares if key in SHARES else numbers)[key] = value
    check_range(where, numbers, least=0)
    check_range(where, shares, least=0, most=1)
    schedule = warmup_cosine(learning_rate * scale(batch_size), total_steps, warmup, final_fraction)
    decay: Decay = weight_decay
    if final_weight_decay is not None:
        decay = cosine_between(weight_decay, final_weight_decay, total_steps)
    return optimiser(schedule, decay, **options), schedule


def make(
    *,
    name: str,
    learning_rate: float,
    total_steps: int,
    batch_size: int,
    scaling: str = 'linear',
    weight_decay: float = 0.0,
    final_weight_decay: float | None = None,
    layer_decay: float = 1.0,
    warmup: float = 0.0,
    final_fraction: float = 0.0,
    clip_norm: float = 0.0,
    modules: Mapping[str, Mapping[str, Any]] | None = None,
    **options: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimiser whose learning rate warms up linearly and falls by a cosine.

    Args:
        name: 'adamw', 'sgd', 'lars' or 'lamb'.
        learning_rate: for the batch size that `scaling` refers to. Not negative.
        total_steps: optimiser steps of the whole run, at least 1.
        batch_size: the global batch: samples (not views) in one optimiser step, over all devices
            and accumulated micro-batches.
        scaling: 'linear': the peak is learning_rate * batch_size / 256 (Goyal et al. 2017,
            arXiv:1706.02677); 'sqrt': learning_rate * √(batch_size / 1024) (DINOv2, Oquab et al.
            2024, arXiv:2304.07193).
        weight_decay: at least 0; which parameters take it: `decayed`.
        final_weight_decay: at least 0; the weight decay goes there by half a cosine over
            total_steps (DINO: from 0.04 to 0.4). None: it is constant.
        layer_decay: in [0, 1]; every layer below the top learns at this share of the rate of the
            one above it, see `layer_factors`. 1: all alike.
        warmup: fraction of total_steps in [0, 1] (see `warmup_cosine`).
        final_fraction: learning rate at the end over its peak, in [0, 1].
        clip_norm: gradients are scaled down to this global norm before the optimiser; 0: never.
        modules: name of a top-level module of the parameters -> what is different for it, so that
            it has an optimiser of its own: {'critic': {'learning_rate': 2e-3, 'b1': 0.5}}. Every
            key but layer_decay and clip_norm, which are of all modules together: the norm is that
            of the whole gradient. With another `name`, `options` are not those of the others.
        **options: adamw: b1, b2, eps; sgd: momentum; lars: momentum, trust_coefficient;
            lamb: b1, b2, eps.

    Returns:
        The transformation, whose update needs the params, and the schedule: step -> learning rate,
        of the parameters that `modules` does not name.

    Raises:
        UserError: an unknown name or option, or a value outside its range; (when starting) a module
            that the parameters do not have; (when updating) a layer_decay for parameters without
            blocks.
    """
    check_range(
        'config', {'total_steps': total_steps, 'batch_size': batch_size}, least=1, whole=True
    )
    check_range(WHERE, {'layer_decay': layer_decay}, least=0, most=1)
    check_range(WHERE, {'clip_norm': clip_norm}, least=0)
    shared = {
        'name': name,
        'learning_rate': learning_rate,
        'scaling': scaling,
        'weight_decay': weight_decay,
        'final_weight_decay': final_weight_decay,
        'warmup': warmup,
        'final_fraction': final_fraction,
    }
    every: dict[str, Any] = shared | options
    transformation, schedule = _one(WHERE, total_steps, batch_size, **every)
    if modules:
        parts: dict[Any, optax.GradientTransformation] = {OTHERS: transformation}
        for module, changes in modules.items():
            inherited = every if changes.get('name', name) == name else shared
            where = f'{WHERE}.modules.{module}'
            parts[module], _ = _one(where, total_steps, batch_size, **{**inherited, **changes})
        transformation = optax.partition(parts, lambda params: _owners(params, modules))
    if layer_decay != 1:
        transformation = optax.chain(transformation, _scale_layers(layer_decay))
    if clip_norm:
        transformation = optax.chain(optax.clip_by_global_norm(clip_norm), transformation)
    return transformation, schedule


def _owners(params: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, str]:
    """Top-level module -> the name of its optimiser in the partition."""
    for module in modules:
        if module not in params:
            raise unknown('module', module, params, f'{WHERE}.modules')
    return {module: module if module in modules else OTHERS for module in params}
