"""Predicting rotations (RotNet, Gidaris et al. 2018, https://arxiv.org/abs/1803.07728).

Every image is seen upright and turned by 90, 180 and 270 degrees, and a linear classifier on the
encoder says which turn it was. Whoever can say so knows what things look like upright. Images
without an up, such as textures, satellite images and the digits 0, 1 and 8, do not tell.

Dimension key: B batch, R turns, H W image.
"""

import jax
import jax.numpy as jnp
import optax

from contrastive_jax import models
from contrastive_jax.config import UserError
from contrastive_jax.layers.heads import Classifier
from contrastive_jax.method import Aux, Batch, Method, Task, Tree
from contrastive_jax.networks.chain import Chain, check_views, seen

TURNS = 4


def make(model: models.Encoder) -> Method:
    """A linear classifier of quarter turns on an encoder; all four turns of each image are seen.

    BatchNorm takes its statistics of the global batch with all its turns. Evaluators see the
    encoder's features of upright images; of the task, the share of turns that are found.

    Args:
        model: the encoder, of square images.
    """
    network = Chain(model, head=Classifier(TURNS))

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        turned(batch['views'][:, 0])
        return network.start(key, batch, records)

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        check_views('rotation', batch['views'], 1)
        turned_BRHWC = turned(batch['views'][:, 0])
        out, stats = network.views(params, extra['stats'], turned_BRHWC, key=key)
        logits_BRK = out['head']
        turn_BR = turns_of(logits_BRK)
        value = optax.softmax_cross_entropy_with_integer_labels(logits_BRK, turn_BR).mean()
        return value, Aux({'stats': stats}, {'accuracy': found(logits_BRK).mean()})

    def score(params: Tree, extra: Tree, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        del key
        turned_BRHWC = turned(seen(batch))
        out, _ = network.views(params, extra['stats'], turned_BRHWC, train=False)
        return {'accuracy': found(out['head']).mean(1)}

    return Method(init, loss, network.encode, task=Task(score, {'accuracy': '%'}))


def found(logits_BRK: jax.Array) -> jax.Array:
    """Which turns are found, [B, R] float32."""
    return (logits_BRK.argmax(2) == turns_of(logits_BRK)).astype(jnp.float32)


def turns_of(logits_BRK: jax.Array) -> jax.Array:
    """The label of each row, [B, R] int32: how many quarter turns it was given."""
    return jnp.broadcast_to(jnp.arange(TURNS, dtype=jnp.int32), logits_BRK.shape[:2])


def turned(images_BHWC: jax.Array) -> jax.Array:
    """Images after 0, 1, 2 and 3 counter-clockwise quarter turns, [B, R, H, W, C].

    Exact ones: interpolation would leave traces that give the turn away.

    Raises:
        UserError: images that are not square.
    """
    shape = images_BHWC.shape
    if len(shape) != 4 or shape[1] != shape[2]:
        raise UserError(
            f'config.inputs: got rows of {list(shape[1:])}; rotation needs square images [S, S, C].'
        )
    turns = [jnp.rot90(images_BHWC, k, axes=(1, 2)) for k in range(TURNS)]
    return jnp.stack(turns, axis=1)
