"""Classification with labels: softmax cross-entropy of a linear classifier on the features.

What self-supervised methods are compared with; trained from another run's encoder (see
`config.init_from`) it is fine-tuning. The recipe for ImageNet is Goyal et al. 2017,
https://arxiv.org/abs/1706.02677; mixup is Zhang et al. 2018, https://arxiv.org/abs/1710.09412.
"""

import jax
import jax.numpy as jnp
import optax

from contrastive_jax import models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import Classifier
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, seen


def make(
    model: models.Encoder,
    *,
    classes: int,
    label: str = 'label',
    mixup: float = 0.0,
    label_smoothing: float = 0.0,
) -> Method:
    """A linear classifier on an encoder, both trained on every view of every labelled record.

    Evaluators see the encoder's features, and the classifier's output as 'logits'. Rows whose label
    is -1 do not count.

    Args:
        model: the encoder.
        classes: how many there are. A label that is not below it makes the loss NaN, which ends a
            run with the names of the batch's records.
        label: the one of the data's labels that is learned.
        mixup: α of Zhang et al.: each row is mixed with another of its batch, images and labels
            alike, by a share from Beta(α, α) that all rows of a step have in common; 0: none.
        label_smoothing: share of the target that all classes have alike, in [0, 1) (Szegedy et al.
            2016, arXiv:1512.00567).
    """
    check_range('config.method', {'classes': classes}, least=1, whole=True, who='supervised')
    check_range('config.method', {'mixup': mixup}, least=0, who='supervised')
    check_range(
        'config.method', {'label_smoothing': label_smoothing}, least=0, below=1, who='supervised'
    )
    network = Chain(model, head=Classifier(classes))

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        drop_key, share_key, order_key = jax.random.split(key, 3)
        views_BVHWC, label_B = batch['views'], batch[label]
        counts_B = label_B >= 0
        target_BC = jax.nn.one_hot(label_B, classes)
        target_BC = jnp.where((label_B < classes)[:, None], target_BC, jnp.nan)
        if mixup:
            share = jax.random.beta(share_key, mixup, mixup)
            partner_B = jax.random.permutation(order_key, len(label_B))
            counts_B &= counts_B[partner_B]
            views_BVHWC, target_BC = (
                share * x + (1 - share) * x[partner_B] for x in (views_BVHWC, target_BC)
            )
        out, stats = network.views(params, extra['stats'], views_BVHWC, key=drop_key)
        logits_BVC = out['head']
        smooth_B1C = optax.smooth_labels(target_BC, label_smoothing)[:, None]
        loss_B = optax.softmax_cross_entropy(logits_BVC, smooth_B1C).mean(1)
        right_B = (logits_BVC.argmax(2) == target_BC.argmax(1)[:, None]).mean(1)

        def mean(x_B: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(counts_B, x_B, 0.0)) / jnp.maximum(jnp.sum(counts_B), 1)

        return mean(loss_B), Aux({'stats': stats}, {'accuracy': mean(right_B)})

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        out, _ = network(params, extra['stats'], seen(batch), train=False)
        return {'features': out['encoder'], 'logits': out['head'], **out['named']}

    return Method(network.start, loss, encode)
