"""FLOPs of traced programs."""

import math
from typing import Any

from contrastive_jax.planning import hlo


def jaxpr_flops(jaxpr: Any, platform: str = 'cpu') -> float:
    """FLOPs of a traced program's matrix products and convolutions, loops counted in full.

    Two a multiply-add. Of a conditional the dearest branch counts, or the one for the platform (as
    `jax.lax.platform_dependent` names them), of a `while` one turn; what `shard_map` runs on every
    device counts as often. What no result needs does not count.
    """
    from jax.interpreters import partial_eval

    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(needed, platform)


def _flops(jaxpr: Any, platform: str) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == 'dot_general':
            (contracted, _), _ = params['dimension_numbers']
            left = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(left[d] for d in contracted)
            continue
        if name == 'conv_general_dilated':
            total += _convolution_flops(eqn)
            continue
        inner = [_flops(j, platform) for j in _subprograms(params)]
        if name == 'cond':
            kinds = params.get('branches_platforms') or ()
            here = [f for f, k in zip(inner, kinds, strict=False) if k is None or platform in k]
            total += here[0] if here else max(inner, default=0.0)
        elif name == 'scan':
            total += params['length'] * sum(inner)
        elif name == 'shard_map':
            total += params['mesh'].size * sum(inner)
        else:
            total += sum(inner)
    return total


def _convolution_flops(eqn: Any) -> float:
    """As many as without what meets padding or the holes of a strided one's gradient."""
    p = eqn.params
    left, right = (v.aval.shape for v in eqn.invars)
    (batch, _, *places), (outputs, inputs, *window), (_, _, *results) = p['dimension_numbers']
    total = 2.0 * left[batch] / p['batch_group_count'] * right[outputs] * right[inputs]
    for d, place in enumerate(places):
        total *= hlo.taps(
            left[place],
            eqn.outvars[0].aval.shape[results[d]],
            right[window[d]],
            p['window_strides'][d],
            p['padding'][d][0],
            p['lhs_dilation'][d],
            p['rhs_dilation'][d],
        )
    return total


def _subprograms(params: dict[str, Any]) -> list[Any]:
    found = []
    for key, value in params.items():
        if key in ('fwd_jaxpr_thunk', 'bwd', 'cond_jaxpr'):
            continue
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, 'eqns'):
                found.append(item)
            elif hasattr(item, 'jaxpr'):
                found.append(item.jaxpr)
    return found
