"""Optimisers, from optax."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_jax.config import UserError, check_range, choose, each, unknown
from contrastive_jax.parameters import KINDS, names, of_kinds, rate_factors
from contrastive_jax.schedules import cosine_between, warmup_cosine, warmup_steps

Decay = float | optax.Schedule
Mask = Callable[[Any], Any]  # parameters -> which of them are decayed

WHERE = 'config.optim'
# Keys of every optimiser, and those of all modules together.
SHARED = (
    *('learning_rate', 'scaling', 'weight_decay', 'final_weight_decay', 'decayed'),
    *('warmup', 'initial_fraction', 'final_fraction', 'milestones', 'milestone_factor', 'frozen'),
)
WHOLE = ('layer_decay', 'patch_embedding_rate', 'bias_rate', 'clip_norm', 'clip_by', 'modules')
SHARES = ('momentum', 'b1', 'b2')  # options from 0 to 1
OTHERS = '*'  # in the partition: the parameters that `modules` does not name
SCALINGS: Mapping[str, Callable[[int], float]] = {  # of the learning rate, by the batch size
    'linear': lambda batch_size: batch_size / 256,  # Goyal et al. 2017, arXiv:1706.02677
    'sqrt': lambda batch_size: math.sqrt(batch_size / 1024),  # DINOv2
}


def _adamw(
    rate: optax.Schedule,
    weight_decay: Decay,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW, decay decoupled and times the rate (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


def _sgd(
    rate: optax.Schedule,
    weight_decay: Decay,
    mask: Mask,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """SGD with momentum and L2 decay added to the gradient, as torch's."""
    decay = optax.add_decayed_weights(weight_decay, mask=mask)
    return optax.chain(decay, optax.sgd(rate, momentum=momentum, nesterov=nesterov))


def _clipped_ratio(rate: optax.Schedule, coefficient: float) -> optax.GradientTransformation:
    """LARS' trust ratio clipped as LARC does: with the rate it makes the smaller of the two."""

    def one(u: jax.Array, w: jax.Array, now: jax.Array) -> jax.Array:
        norms = jnp.linalg.norm(w.ravel()), jnp.linalg.norm(u.ravel())
        ratio = coefficient * norms[0] / jnp.where(norms[1] == 0, 1.0, norms[1])
        clipped = jnp.where(ratio < now, ratio / jnp.where(now == 0, 1.0, now), 1.0)
        return u * jnp.where((norms[0] == 0) | (norms[1] == 0), 1.0, clipped)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        now = jnp.asarray(rate(state))
        return jax.tree.map(lambda u, w: one(u, w, now), updates, params), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def _lars(
    rate: optax.Schedule,
    weight_decay: Decay,
    mask: Mask,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    classic_momentum: bool = True,
    clip_ratio: bool = False,
) -> optax.GradientTransformation:
    """LARS (You et al. 2017, arXiv:1708.03888); what is not decayed learns by plain SGD."""
    ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    if clip_ratio:
        ratio = _clipped_ratio(rate, trust_coefficient)
    last = [optax.scale_by_learning_rate(rate), optax.trace(momentum)]
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.masked(ratio, mask),
        *(last if classic_momentum else reversed(last)),
    )


def _lamb(
    rate: optax.Schedule,
    weight_decay: Decay,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, arXiv:1904.00962); what is not decayed learns by plain Adam.

    Paper: a trust ratio for every parameter; here: for the decayed ones alone, because a
    bias that starts at 0 could only grow by a factor of 1 + rate a step. So this is `optax.lamb`
    with its trust ratio masked, which it has no option for.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.masked(optax.scale_by_trust_ratio(), mask),
        optax.scale_by_learning_rate(rate),
    )


OPTIMISERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    'adamw': _adamw,
    'sgd': _sgd,
    'lars': _lars,
    'lamb': _lamb,
}


def _thaw(make: Callable[[int], optax.GradientTransformation], start: int) -> Any:
    """An optimiser that neither moves parameters nor remembers gradients before step `start`.

    Args:
        make: number of the optimiser's first step -> an optimiser.
        start: that number.
    """
    inner = make(start)

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        step, before = state
        moved, after = inner.update(updates, before, params)
        moved = jax.tree.map(lambda u: jnp.where(step >= start, u, 0.0), moved)
        after = jax.tree.map(lambda new, old: jnp.where(step >= start, new, old), after, before)
        return moved, (step + 1, after)

    return optax.GradientTransformation(init, update)


def _clip(norm: float, by: str) -> optax.GradientTransformation:
    """Scales gradients down to a norm: of all of them, of each module or of each tensor."""

    def one(gradients: Any) -> Any:
        return optax.clip_by_global_norm(norm).update(gradients, optax.EmptyState())[0]

    def clip(gradients: Any, params: Any) -> Any:
        del params
        if by == 'module':
            return {name: one(module) for name, module in gradients.items()}
        return one(gradients) if by == 'all' else jax.tree.map(one, gradients)

    return optax.stateless(clip)


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
    decayed: Sequence[str],
    warmup: float,
    initial_fraction: float,
    final_fraction: float,
    milestones: Sequence[float],
    milestone_factor: float,
    frozen: float,
    **options: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of parameters that share all of these: see `make`."""
    optimiser = choose('optimiser', name, OPTIMISERS, where)
    own = list(inspect.signature(optimiser).parameters)[3:]
    for key in options:
        if key not in own:
            settable = [*own, *SHARED, *(WHOLE if where == WHERE else ())]
            raise unknown(f'key for {name}', key, settable, where)
    for kind in decayed:
        choose('kind of parameter', kind, dict.fromkeys(KINDS), f'{where}.decayed')
    scale = choose('scaling', scaling, SCALINGS, where)
    numbers = {'learning_rate': learning_rate, 'weight_decay': weight_decay}
    if final_weight_decay is not None:
        numbers['final_weight_decay'] = final_weight_decay
    shares = {'warmup': warmup, 'frozen': frozen}
    shares |= {'initial_fraction': initial_fraction, 'final_fraction': final_fraction}
    shares |= {'milestone_factor': milestone_factor, **each('milestones', milestones)}
    for key, value in options.items():
        if not isinstance(value, bool):
            (shares if key in SHARES else numbers)[key] = value
    check_range(where, numbers, least=0)
    check_range(where, shares, least=0, most=1)
    peak = learning_rate * scale(batch_size)
    schedule = warmup_cosine(peak, total_steps, warmup, final_fraction, initial_fraction)
    if milestones:
        if final_fraction:
            raise UserError(
                f'{where}: got final_fraction={final_fraction} and milestones={milestones}; the '
                'first is where a cosine ends, which milestones take the place of.'
            )
        falling = milestones, milestone_factor
        schedule = warmup_steps(peak, total_steps, *falling, warmup, initial_fraction)
    decay: Decay = weight_decay
    if final_weight_decay is not None:
        decay = cosine_between(weight_decay, final_weight_decay, total_steps)

    def of_kind(params: Any) -> Any:
        return of_kinds(params, decayed)

    def start_at(first: int) -> optax.GradientTransformation:
        def later(x: Any) -> Any:
            return (lambda step: x(step + first)) if first and callable(x) else x

        return optimiser(later(schedule), later(decay), of_kind, **options)

    first = round(frozen * total_steps)
    return (_thaw(start_at, first) if first else start_at(0)), schedule


def make(
    *,
    name: str,
    learning_rate: float,
    total_steps: int,
    batch_size: int,
    scaling: str = 'linear',
    weight_decay: float = 0.0,
    final_weight_decay: float | None = None,
    decayed: Sequence[str] = ('kernels', 'embeddings'),
    layer_decay: float = 1.0,
    patch_embedding_rate: float = 1.0,
    bias_rate: float = 1.0,
    warmup: float = 0.0,
    initial_fraction: float = 0.0,
    final_fraction: float = 0.0,
    milestones: Sequence[float] = (),
    milestone_factor: float = 0.1,
    frozen: float = 0.0,
    clip_norm: float = 0.0,
    clip_by: str = 'all',
    modules: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimiser whose learning rate warms up linearly and falls by a cosine or in steps.

    Args:
        name: 'adamw', 'sgd', 'lars' or 'lamb'.
        learning_rate: for the batch size that `scaling` refers to. Not negative.
        total_steps: optimiser steps of the whole run, at least 1.
        batch_size: the global batch: samples (not views) in one optimiser step, over all devices
            and accumulated micro-batches.
        scaling: 'linear': the peak is learning_rate * batch_size / 256 (Goyal et al. 2017,
            arXiv:1706.02677); 'sqrt': learning_rate * √(batch_size / 1024) (DINOv2, Oquab et al.
            2024, arXiv:2304.07193).
        weight_decay: at least 0.
        final_weight_decay: at least 0; the weight decay goes there by half a cosine over
            total_steps (DINO: from 0.04 to 0.4). None: it is constant.
        decayed: kinds of parameters that take weight decay and, with lars and lamb, a trust ratio:
            'kernels', 'embeddings', 'positions', 'tokens', 'vectors' (see `parameters.kinds`).
        layer_decay: in [0, 1]; every layer below the top learns at this share of the rate of the
            one above it, see `parameters.rate_factors`. 1: all alike.
        patch_embedding_rate, bias_rate: factors of the learning rate, at least 0, of the layer that
            embeds patches and of biases, norms and other vectors.
        warmup: fraction of total_steps in [0, 1] (see `warmup_cosine`).
        initial_fraction, final_fraction: learning rate at the start of the warm-up and at the end
            over its peak, in [0, 1].
        milestones: fractions of total_steps in [0, 1] at each of which the rate is multiplied by
            milestone_factor, also in [0, 1], in the place of the cosine (see `warmup_steps`).
        frozen: fraction of total_steps in [0, 1] in which nothing moves and no gradient enters the
            optimiser's state. For `modules`: DINO's and SwAV's last layers.
        clip_norm: gradients are scaled down to this norm before the optimiser; 0: never.
        clip_by: whose norm: 'all' gradients', each top-level 'module' 's (DINOv2's code), each
            'tensor' 's (DINO's).
        modules: path of a module of the parameters ('critic', 'head/last') -> what is different for
            it, so that it has an optimiser of its own: {'critic': {'learning_rate': 2e-3,
            'b1': 0.5}}. Every key but those of all modules together: layer_decay,
            patch_embedding_rate, bias_rate, clip_norm and clip_by. With another `name`, `options`
            are not those of the others.
        **options: adamw: b1, b2, eps; sgd: momentum, nesterov; lars: momentum, trust_coefficient,
            classic_momentum (True: the learning rate is within the momentum, as in SimCLR's code;
            False: outside, as in torch), clip_ratio (a tensor's rate is the smaller one of
            learning rate and trust ratio, not their product: LARC, solo-learn); lamb: b1, b2, eps.

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
    factors = {'patch_embedding_rate': patch_embedding_rate, 'bias_rate': bias_rate}
    check_range(WHERE, {'clip_norm': clip_norm, **factors}, least=0)
    choose('norm', clip_by, dict.fromkeys(('all', 'module', 'tensor')), f'{WHERE}.clip_by')
    shared = {
        'name': name,
        'learning_rate': learning_rate,
        'scaling': scaling,
        'weight_decay': weight_decay,
        'final_weight_decay': final_weight_decay,
        'decayed': tuple(decayed),
        'warmup': warmup,
        'initial_fraction': initial_fraction,
        'final_fraction': final_fraction,
        'milestones': tuple(milestones),
        'milestone_factor': milestone_factor,
        'frozen': frozen,
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
    chosen = (layer_decay, patch_embedding_rate, bias_rate)
    if any(factor != 1 for factor in chosen):
        transformation = optax.chain(transformation, _scale(*chosen))
    if clip_norm:
        transformation = optax.chain(_clip(clip_norm, clip_by), transformation)
    return transformation, schedule


def _scale(*factors: float) -> optax.GradientTransformation:
    """Multiplies every update, weight decay included, by its parameter's `rate_factors`."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda u, factor: u * factor, updates, rate_factors(updates, *factors))

    return optax.stateless(scale)


def _owners(params: Mapping[str, Any], modules: Mapping[str, Any]) -> Any:
    """For each parameter the path of the innermost module that has it, or OTHERS."""
    paths = {tuple(module.split('/')): module for module in modules}
    within: set[tuple[str, ...]] = set()

    def owner(path: tuple, _: Any) -> str:
        parts = names(path)
        outer = [parts[:i] for i in range(len(parts), 0, -1)]
        within.update(outer)
        return next((paths[part] for part in outer if part in paths), OTHERS)

    labels = jax.tree_util.tree_map_with_path(owner, params)
    for path, module in paths.items():
        if path not in within:
            beside = sorted('/'.join(w) for w in within if w[:-1] == path[:-1] or len(w) == 1)
            raise unknown('module', module, beside, f'{WHERE}.modules')
    return labels
