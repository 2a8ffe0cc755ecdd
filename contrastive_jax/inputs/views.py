"""Augmented views of given records, as pictures: what evaluators that compare views look at.

n: records, V: views of a training batch, S: side of a view.
"""

import functools
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from contrastive_jax import augment, data, parallel
from contrastive_jax import config as config_lib
from contrastive_jax.config import Config
from contrastive_jax.data import BadRecord
from contrastive_jax.inputs import geometry

TOGETHER = 64  # records that are augmented at a time


def pairs(
    config: Config, source: data.Source, rows: Sequence[int] | np.ndarray, seed: int
) -> np.ndarray:
    """Two views of each record, cropped and augmented as config's training does.

    Of a method with several views they are the first two; of one with a single view, two draws of
    it. A record's crops depend on the seed and its number alone, its augmentation also on its place
    among the rows.

    Args:
        config: a run's; its data and augment count.
        source: of records.
        rows: n record numbers.
        seed: of crops and augmentation.

    Returns:
        [n, 2, S, S, 3] uint8, on every process the same: augmented pixels, which are in [0, 1],
        rounded to 8 bits. Zeros for a record that cannot be used.
    """
    d = config.data
    side, views = config_lib.view_size(d), d.views
    draws = 2 if views == 1 else 1
    options = geometry.crop_options(d.crop)
    size = (views, side, d.local_views, d.local_size)
    augmented = _augmentation(json.dumps(config.augment.to_dict()), *size)
    found = np.zeros((len(rows), 2, side, side, 3), np.uint8)
    # Every process does all of them for itself, on one device.
    with jax.set_mesh(parallel.make_mesh(jax.local_devices()[:1])):
        for start in range(0, len(rows), TOGETHER):
            some = list(map(int, rows[start : start + TOGETHER]))
            crops = np.zeros((TOGETHER, draws, views, side, side, 3), np.uint8)
            bad = []
            for i, row in enumerate(some):
                try:
                    picture = Image.fromarray(source[row]['image'])
                except BadRecord:
                    bad.append(i)
                    continue
                rng = np.random.default_rng([seed, row])
                for draw, view in np.ndindex(draws, views):
                    crops[i, draw, view] = geometry.random_resized_crop(
                        picture, rng, side, **options
                    )
            key = jax.random.fold_in(jax.random.key(seed), start)
            x = np.array(augmented(key, crops.reshape(-1, views, side, side, 3)))
            x = x.reshape(TOGETHER, -1, side, side, 3)[: len(some), :2]
            x[bad] = 0
            found[start : start + len(some)] = x
    return found


@functools.lru_cache(maxsize=2)
def _augmentation(
    spec: str, views: int, side: int, local_views: int, local_size: int
) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    """`(key, crops) -> augmented crops`, both [B, V, S, S, 3] uint8; compiled once."""
    # With these moments the augmentation ends in [0, 1].
    augmentation = augment.make(
        json.loads(spec),
        views=views,
        image_size=side,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        local_views=local_views,
        local_size=local_size,
    )

    @jax.jit
    def augmented(key: jax.Array, crops: jax.Array) -> jax.Array:
        shape = (len(crops), local_views, local_size, local_size, 3)
        # Local views are asked for, but not returned and so not computed.
        batch = {'views': crops, 'local_views': jnp.zeros(shape, jnp.uint8)}
        x = augmentation(key, batch)['views']
        return jnp.round(255 * jnp.clip(x, 0, 1)).astype(jnp.uint8)

    return augmented
