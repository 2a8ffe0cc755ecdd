"""DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193, section 4).

DINO on the CLS token, iBOT on masked patches (Zhou et al. 2022, https://arxiv.org/abs/2111.07832)
with a head of its own, and KoLeo, which keeps CLS tokens apart. Sinkhorn's iterations take the
place of DINO's centre. Layer-wise learning rates and stochastic depth are in the config.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import losses, models
from contrastive_jax.augment.masking import block_mask
from contrastive_jax.config import UserError, check_range
from contrastive_jax.layers.heads import DINOHead
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, hold, join_crops
from contrastive_jax.networks.target import Target, momentum_to_one, ramp


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.1,
    teacher_temperature: tuple[float, float] = (0.04, 0.07),
    sharpen: float = 0.3,
    momentum: float = 0.992,
    frozen: float = 0.01,
    koleo: float = 0.1,
    patches: float = 1.0,
    mask_prob: float = 0.5,
    mask_ratio: tuple[float, float] = (0.1, 0.5),
    prototypes: int = 65536,
    hidden: int = 2048,
    bottleneck: int = 256,
) -> Method:
    """DINOv2 around a ViT that has a CLS token.

    Paper: exactly half of the images are masked; here: each with probability `mask_prob`, because
    images then need not move between devices. KoLeo is over the global batch, not a device's.

    Args:
        model: the encoder; takes `mask` and returns 'cls' and 'patches'.
        temperature: τ_s of the student, > 0.
        teacher_temperature: τ_t of the teacher, > 0: at the start, and after `sharpen`.
        sharpen: share of the run in which τ_t rises linearly.
        momentum: of the teacher at the start, from 0 to 1; it rises to 1 by a cosine.
        frozen: share of the run in which the heads' last layers do not learn.
        koleo, patches: weights of KoLeo and of the masked patches' loss, at least 0.
        mask_prob: probability that a global view is masked.
        mask_ratio: smallest and largest share of its patches that are.
        prototypes: K, outputs of each head.
        hidden: width of the heads' hidden layers.
        bottleneck: dimensions in front of the last layers.
    """
    temperatures = {'temperature': temperature, 'teacher_temperature': min(teacher_temperature)}
    shares = {'sharpen': sharpen, 'frozen': frozen, 'momentum': momentum, 'mask_prob': mask_prob}
    weights = {'koleo': koleo, 'patches': patches}
    check_range('config.method', temperatures, above=0, who='dinov2')
    check_range('config.method', shares, least=0, most=1, who='dinov2')
    check_range('config.method', weights, least=0, who='dinov2')
    network = Chain(model, head=DINOHead(prototypes, hidden, bottleneck))
    patch_head = DINOHead(prototypes, hidden, bottleneck)
    target = Target(network, ('encoder', 'head', 'patch_head'), momentum_to_one(momentum))

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        key, head_key = jax.random.split(key)
        images = batch['views'][:, 0].astype(jnp.float32)
        # A mask at the start makes the encoder's mask token.
        mask = jnp.zeros((len(images), _patches(images)), bool)
        params, stats = network.init(key, images, mask=mask)
        named = network.features(params, stats, images)
        params['patch_head'], stats['patch_head'] = models.init(
            patch_head, head_key, named['patches'][:, 0]
        )
        return params, {'stats': stats, 'target': target.copy(params, stats)}

    def _patches(images: jax.Array) -> int:
        def run(images: jax.Array) -> dict[str, jax.Array]:
            params, stats = models.init(model, jax.random.key(0), images)
            return network.features({'encoder': params}, {'encoder': stats}, images)

        named = jax.eval_shape(run, images)
        if 'cls' not in named or 'patches' not in named:
            raise UserError(
                "config.model: dinov2 needs a ViT with pool='cls'; this one's outputs are "
                f'{tuple(named)}.'
            )
        return named['patches'].shape[1]

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        mask_key, key = jax.random.split(key)
        views = batch['views']
        B, V = views.shape[:2]
        N = _patches(views[:1, 0])
        side = math.isqrt(N)
        mask_RN = block_mask(mask_key, B * V, side, N // side, ratio=mask_ratio, prob=mask_prob)
        for name in ('head', 'patch_head'):
            last = hold(params[name]['last'], progress < frozen)
            params = {**params, name: {**params[name], 'last': last}}

        out, stats = join_crops('dinov2', network, params, extra['stats'], batch, key, mask=mask_RN)
        taught, target_state = target.views(extra['target'], views)
        tau = ramp(progress, *teacher_temperature, share=sharpen)
        flat_RK = rearrange(taught['head'], 'b v k -> (b v) k')
        targets_BVK = losses.sinkhorn(flat_RK, temperature=tau).reshape(taught['head'].shape)
        value = cls = losses.swapped(targets_BVK, out['head'], temperature=temperature)

        # Only as many patches of a view as can be masked go through the head.
        most = max(1, math.ceil(mask_ratio[1] * N))
        place_RM = jnp.argsort(~mask_RN, axis=1, stable=True)[:, :most]
        counts_RM = jnp.take_along_axis(mask_RN, place_RM, axis=1)

        def through(params: Tree, stats: Tree, named: Tree) -> tuple[jax.Array, Tree]:
            patches_RND = rearrange(named['patches'], 'b v n d -> (b v) n d')
            chosen = jnp.take_along_axis(patches_RND, place_RM[..., None], axis=1)
            x = rearrange(chosen, 'r m d -> (r m) d')
            return models.apply(
                patch_head, params['patch_head'], stats['patch_head'], x, train=True
            )

        student, stats['patch_head'] = through(params, extra['stats'], out['named'])
        teacher, target_state['stats']['patch_head'] = through(
            target_state['params'], extra['target']['stats'], taught['named']
        )
        counts = counts_RM.reshape(-1).astype(jnp.float32)
        assigned = losses.sinkhorn(teacher, temperature=tau, weights_B=counts)
        weights_RM = counts_RM / (jnp.maximum(counts_RM.sum(1, keepdims=True), 1) * (B * V))
        ibot = losses.masked(assigned, student, weights_RM.reshape(-1), temperature=temperature)
        value += patches * ibot

        cls_BVD = out['named']['cls'][:, :V]
        # The sum over views, as in the authors' code.
        apart = jnp.asarray(sum(losses.koleo(cls_BVD[:, v]) for v in range(V)))
        value += koleo * apart
        metrics = {
            'cls': cls,
            'patches': ibot,
            'koleo': apart,
            'output_std': losses.output_std(cls_BVD[:, 0]),
        }
        return value, Aux({'stats': stats, 'target': target_state}, metrics)

    return Method(init, loss, target.encode, target.follow, encoders=target.encoders)
