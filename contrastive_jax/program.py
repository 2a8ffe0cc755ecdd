"""What a config computes: its training step, compiled for the devices that it is to run on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_jax import augment, models, optim, parallel
from contrastive_jax import config as config_lib
from contrastive_jax.config import Config, UserError
from contrastive_jax.method import Batch, Method
from contrastive_jax.state import TrainState, make_init, make_step


class Program(NamedTuple):
    """What a config computes, without the data."""

    method: Method
    schedule: Callable[[int], jax.Array]
    augment: Callable[[jax.Array, Batch], Batch]  # in a step: views from uint8 to float
    total_steps: int
    batch: dict[str, jax.ShapeDtypeStruct]  # of one step
    init: Callable[[], TrainState]
    step: Callable[..., Any]
    state: TrainState  # shapes, dtypes and shardings


def build(config: Config, mesh: jax.sharding.Mesh, images: int) -> Program:
    """The training step of a config, and the state that it starts from.

    Args:
        config: as in `train.run`.
        mesh: of the devices that it runs on, or is compiled for.
        images: of an epoch.
    """
    d = config.data
    size = config.batch_size
    parallel.check_batch(mesh, size, config.accumulate, config.microbatch)
    model = config_lib.build('models', config.model, 'config.model', remat=config.remat)
    if config.microbatch:
        model = models.Microbatched(model, size // config.accumulate // config.microbatch)
    method = config_lib.build('methods', config.method, 'config.method', model)
    pictures = augment.make(
        config.augment.to_dict(),
        views=d.views,
        image_size=d.image_size,
        mean=d.mean,
        std=d.std,
        local_views=d.local_views,
        local_size=d.local_size,
    )
    total_steps = config.total_steps or round(config.total_epochs * images / size)
    if total_steps < 1:
        raise UserError(
            f'config.total_steps: got {config.total_steps} and config.total_epochs '
            f'{config.total_epochs:g}; expected one of them to be above 0.'
        )
    tx, schedule = config_lib.call(
        optim.make, 'config.optim', **config.optim, total_steps=total_steps, batch_size=size
    )
    split = parallel.rows(mesh)
    shapes = {'views': (d.views, d.image_size, d.image_size, 3)}
    if d.local_views:
        shapes['local_views'] = (d.local_views, d.local_size, d.local_size, 3)

    def batch(rows: int, pixels: Any) -> dict[str, jax.ShapeDtypeStruct]:
        integer = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
        found = {
            name: jax.ShapeDtypeStruct((rows, *shape), pixels, sharding=split)
            for name, shape in shapes.items()
        }
        return {**found, 'label': integer, 'index': integer}

    make = make_init(method, tx, config.seed, images)

    def init() -> TrainState:
        return make({k: jnp.zeros(v.shape, v.dtype) for k, v in batch(1, jnp.float32).items()})

    state = parallel.lay_out(mesh, jax.eval_shape(init), config.fsdp)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
        make_step(method, tx, pictures, config.seed, total_steps, config.accumulate),
        donate_argnums=0,
        in_shardings=(shardings, split),
        out_shardings=(shardings, parallel.replicated(mesh)),
    )
    return Program(
        method,
        schedule,
        pictures,
        total_steps,
        batch(size, jnp.uint8),
        jax.jit(init, out_shardings=shardings),
        step,
        state,
    )
