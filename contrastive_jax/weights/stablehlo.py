"""An encoder as a program of its own: weights and normalisation inside, any batch size."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_jax import augment, weights
from contrastive_jax.config import UserError

PLATFORMS = ('cpu', 'cuda', 'tpu')


def make(found: weights.Weights, pixels: str = 'uint8') -> tuple[bytes, dict[str, Any]]:
    """`(program, how to call it)`: `jax.export.deserialize(program).call(images)`, on any of
    PLATFORMS, is {'features': [B, D]}, with 'embedding' [B, E] where texts share one; float32.

    Args:
        found: the encoder.
        pixels: of images [B, S, S, 3], 'uint8', or 'float32' from 0 to 1.

    Raises:
        UserError: flatbuffers, in which JAX writes programs, is not installed.
    """
    if importlib.util.find_spec('flatbuffers') is None:
        raise UserError('stablehlo: needs flatbuffers: pip install flatbuffers')
    encode, (params, extra) = weights.encoder(found)
    d = found.config.inputs
    mean, std, size = tuple(d.mean), tuple(d.std), d.size

    def run(images: jax.Array) -> dict[str, jax.Array]:
        x = images.astype(jnp.float32)
        # `normalize` takes uint8's range.
        x = augment.normalize(x if pixels == 'uint8' else x * 255, mean, std)
        out = encode(params, extra, {'image': x})
        return {name: out[name] for name in ('features', 'embedding') if name in out}

    (batch,) = jax.export.symbolic_shape('b')
    shape = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.dtype(pixels))
    exported = jax.export.export(jax.jit(run), platforms=PLATFORMS)(shape)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    about = {
        'call': "jax.export.deserialize(open(file, 'rb').read()).call(images)",
        'images': f'{pixels} [b, {size}, {size}, 3], RGB, b at least 1'
        + (', from 0 to 1' if pixels == 'float32' else ''),
        'outputs': {name: f'{x.dtype} [b, {x.shape[1]}]' for name, x in outputs.items()},
        'resize': {
            'shorter_side': round(size / d.crop_fraction),
            'interpolation': d.crop.interpolation,
            'then': f'centre crop of {size} x {size}',
        },
        'inside': {'mean': mean, 'std': std},
        'platforms': PLATFORMS,
        'model': weights.described(found)['model'],
        'jax': jax.__version__,
    }
    return bytes(exported.serialize()), about
