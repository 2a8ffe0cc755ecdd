"""Classification with labels: softmax cross-entropy of a linear classifier on the features.

What self-supervised methods are compared with; trained from another run's encoder (see
`config.init_from`) it is fine-tuning. The recipe for ImageNet is Goyal et al. 2017,
https://arxiv.org/abs/1706.02677; mixup is Zhang et al. 2018, https://arxiv.org/abs/1710.09412,
CutMix Yun et al. 2019, https://arxiv.org/abs/1905.04899.

Dimension key: B batch, V views, H W image, C classes.
"""

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from contrastive_jax import models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import Classifier
from contrastive_jax.method import Aux, Batch, Encoders, Method, Tree, online
from contrastive_jax.networks.chain import Chain, seen


def make(
    model: models.Encoder,
    *,
    classes: int,
    label: str = 'label',
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
    locked: bool = False,
    batch_norm: bool = False,
    head_std: float = 0.0,
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
        cutmix: α of Yun et al.: a rectangle of each image is another one's, at the same place in
            all rows of a step, and the labels are mixed by its area; 0: none. With mixup, too,
            each step does one of the two, which a fair coin tells.
        label_smoothing: share of the target that all classes have alike, in [0, 1) (Szegedy et al.
            2016, arXiv:1512.00567).
        locked: a linear probe: the encoder stays as it is, and is as evaluators see it. Give it
            weights by config.init_from.
        batch_norm: BatchNorm without scale and bias between features and classifier, from the
            global batch, as in MAE's linear probe (He et al. 2022, arXiv:2111.06377, appendix A.1).
        head_std: of the classifier's kernel at the start, N(0, ·²); 0: it starts at 0.
    """
    check_range('config.method', {'classes': classes}, least=1, whole=True, who='supervised')
    amounts = {'mixup': mixup, 'cutmix': cutmix, 'head_std': head_std}
    check_range('config.method', amounts, least=0, who='supervised')
    check_range(
        'config.method', {'label_smoothing': label_smoothing}, least=0, below=1, who='supervised'
    )
    network = Chain(model, head=Classifier(classes, head_std, batch_norm))

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        params, extra = network.start(key, batch, records)
        if locked:  # no gradient and no weight decay reaches it there
            extra['frozen'] = {'encoder': params.pop('encoder')}
        return params, extra

    def whole(params: Tree, extra: Tree) -> Tree:
        return {**extra.get('frozen', {}), **params}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        del progress
        drop_key, share_key, order_key = jax.random.split(key, 3)
        views_BVHWC, label_B = batch['views'], batch[label]
        counts_B = label_B >= 0
        target_BC = jax.nn.one_hot(label_B, classes)
        target_BC = jnp.where((label_B < classes)[:, None], target_BC, jnp.nan)
        if mixup or cutmix:
            own = share(share_key, views_BVHWC.shape[2:4], mixup, cutmix)
            partner_B = jax.random.permutation(order_key, len(label_B))
            counts_B &= counts_B[partner_B]
            views_BVHWC = own * views_BVHWC + (1 - own) * views_BVHWC[partner_B]
            target_BC = own.mean() * target_BC + (1 - own.mean()) * target_BC[partner_B]
        if locked:
            V, images = views_BVHWC.shape[1], rearrange(views_BVHWC, 'b v ... -> (b v) ...')
            x_RD = network.features(whole(params, extra), extra['stats'], images)['features']
            out, new = network.top(params, extra['stats'], x_RD)
            logits_BVC, stats = rearrange(out['head'], '(b v) c -> b v c', v=V), new
        else:
            out, stats = network.views(params, extra['stats'], views_BVHWC, key=drop_key)
            logits_BVC = out['head']
        smooth_B1C = optax.smooth_labels(target_BC, label_smoothing)[:, None]
        loss_B = optax.softmax_cross_entropy(logits_BVC, smooth_B1C).mean(1)
        right_B = (logits_BVC.argmax(2) == target_BC.argmax(1)[:, None]).mean(1)

        def mean(x_B: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(counts_B, x_B, 0.0)) / jnp.maximum(jnp.sum(counts_B), 1)

        extra = {**extra, 'stats': {**extra['stats'], **stats}}
        return mean(loss_B), Aux(extra, {'accuracy': mean(right_B)})

    def encode(params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        out, _ = network(whole(params, extra), extra['stats'], seen(batch), train=False)
        return {'features': out['encoder'], 'logits': out['head'], **out['named']}

    def encoders(params: Tree, extra: Tree) -> Encoders:
        return online(whole(params, extra), extra)

    return Method(init, loss, encode, encoders=encoders)


def share(key: jax.Array, size: tuple[int, ...], mixup: float, cutmix: float) -> jax.Array:
    """The share of its own that a mixed record has, a scalar; with cutmix each pixel's.

    Args:
        key: of all draws.
        size: H and W.
        mixup, cutmix: α of each, one of them above 0.

    Returns:
        [], or [1, 1, H, W, 1] as images have it.
    """
    if not cutmix:
        return jax.random.beta(key, mixup, mixup)
    mixup_key, cutmix_key, place_key, coin_key = jax.random.split(key, 4)
    # Sides √(1 − λ) of the image's, about a centre anywhere; what lies outside is cut off.
    side = jnp.sqrt(1 - jax.random.beta(cutmix_key, cutmix, cutmix))
    half_2 = (jnp.asarray(size) * side).astype(jnp.int32) // 2
    centre_2 = jax.random.randint(place_key, (2,), 0, jnp.asarray(size))
    inside_H, inside_W = (
        jnp.abs(2 * (jnp.arange(length) - centre) + 1) <= 2 * half
        for length, centre, half in zip(size, centre_2, half_2, strict=True)
    )
    own = 1.0 - (inside_H[:, None] & inside_W[None, :])[None, None, :, :, None]
    if not mixup:
        return own
    mixed = jax.random.beta(mixup_key, mixup, mixup)
    return jnp.where(jax.random.bernoulli(coin_key), mixed, own)
