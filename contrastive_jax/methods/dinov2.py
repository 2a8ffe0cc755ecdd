"""DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193, section 4).

DINO on the CLS token, iBOT on masked patches (Zhou et al. 2022, https://arxiv.org/abs/2111.07832)
and KoLeo, which keeps CLS tokens apart. The paper's own recipe has Sinkhorn's iterations in the
place of DINO's centre and a head of the patches' own, the authors' short ImageNet recipe neither.
Layer-wise learning rates, stochastic depth and how long last layers are frozen are in the config.
Authors' code: moments of frozen layers move; here: they start at the thaw, as in DINO's code.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax import losses, models
from contrastive_jax.augment.masking import block_mask
from contrastive_jax.config import UserError, check_range, choose
from contrastive_jax.layers.heads import DINOHead
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, count_patches, join_crops
from contrastive_jax.networks.target import Target, momentum_to_one, ramp


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.1,
    teacher_temperature: tuple[float, float] = (0.04, 0.07),
    sharpen: float = 0.3,
    momentum: float = 0.992,
    centring: str = 'sinkhorn',
    centre_momentum: float = 0.9,
    shared_head: bool = False,
    koleo: float = 0.1,
    patches: float = 1.0,
    mask_prob: float = 0.5,
    mask_ratio: tuple[float, float] = (0.1, 0.5),
    prototypes: int = 65536,
    hidden: int = 2048,
    bottleneck: int = 256,
    head_std: float | None = 0.02,
    patch_bottleneck: int | None = None,
) -> Method:
    """DINOv2 around a ViT that has a CLS token.

    Paper: exactly half of the images are masked; here: each with probability `mask_prob`, because
    images then need not move between devices. Authors' code: KoLeo and the masked patches' centre
    are each device's; here: the global batch's. Prototypes have learned lengths, as there.

    Args:
        model: the encoder; takes `mask` and returns 'cls' and 'patches'.
        temperature: τ_s of the student, > 0.
        teacher_temperature: τ_t of the teacher, > 0: at the start, and after `sharpen`.
        sharpen: share of the run in which τ_t rises linearly.
        momentum: of the teacher at the start, from 0 to 1; it rises to 1 by a cosine.
        centring: of the teacher's outputs: 'sinkhorn', over CLS tokens and over masked patches; or
            'centre', a running mean of each of the two, subtracted as in DINO.
        centre_momentum: of these means, from 0 to 1.
        shared_head: patches go through the head of CLS, 'head', not through one of their own,
            'patch_head'.
        koleo, patches: weights of KoLeo and of the masked patches' loss, at least 0.
        mask_prob: probability that a global view is masked.
        mask_ratio: smallest and largest share of its patches that are.
        prototypes: K, outputs of each head.
        hidden: width of the heads' hidden layers.
        bottleneck: dimensions in front of the last layers.
        head_std: of the heads' kernels at the start, > 0; None, for narrow heads: LeCun's.
        patch_bottleneck: those of the patches' own head, if they are others.
    """
    positive = {'temperature': temperature, 'teacher_temperature': min(teacher_temperature)}
    positive |= {} if head_std is None else {'head_std': head_std}
    shares = {'sharpen': sharpen, 'mask_prob': mask_prob}
    shares |= {'momentum': momentum, 'centre_momentum': centre_momentum}
    weights = {'koleo': koleo, 'patches': patches}
    check_range('config.method', positive, above=0, who='dinov2')
    check_range('config.method', shares, least=0, most=1, who='dinov2')
    check_range('config.method', weights, least=0, who='dinov2')
    choose('centring', centring, dict.fromkeys(('sinkhorn', 'centre')), 'config.method')
    if shared_head and patch_bottleneck is not None:
        raise UserError(
            f'config.method.patch_bottleneck: got {patch_bottleneck}; with shared_head patches '
            'have no head of their own.'
        )
    head = DINOHead(prototypes, hidden, bottleneck, learn_length=True, std=head_std)
    own = bottleneck if patch_bottleneck is None else patch_bottleneck
    patch_head = head if shared_head else head.clone(bottleneck=own)
    of_patches = 'head' if shared_head else 'patch_head'
    network = Chain(model, head=head)
    modules = ('encoder', 'head', 'patch_head')[: 2 if shared_head else 3]
    target = Target(network, modules, momentum_to_one(momentum))

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        del records
        key, head_key = jax.random.split(key)
        images = batch['views'][:, 0].astype(jnp.float32)
        # A mask at the start makes the encoder's mask token.
        mask = jnp.zeros((len(images), patches_of(images)), bool)
        params, stats = network.init(key, images, mask=mask)
        if not shared_head:
            named = network.features(params, stats, images)
            params['patch_head'], stats['patch_head'] = models.init(
                patch_head, head_key, named['patches'][:, 0]
            )
        extra = {'stats': stats, 'target': target.copy(params, stats)}
        if centring == 'centre':
            extra |= {'centre': jnp.zeros(prototypes), 'patch_centre': jnp.zeros(prototypes)}
        return params, extra

    def patches_of(images: jax.Array) -> int:
        return count_patches('dinov2', model, images, ('cls', 'patches'))

    def targets(scores: jax.Array, centre_K: Tree, tau: jax.Array, weights_R: Tree = None):
        if centre_K is not None:
            return losses.teacher(scores, centre_K, tau)
        flat_RK = scores.reshape(-1, prototypes)
        found_RK = losses.sinkhorn(flat_RK, temperature=tau, weights_B=weights_R)
        return found_RK.reshape(scores.shape)

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        mask_key, key = jax.random.split(key)
        views = batch['views']
        B, V = views.shape[:2]
        N = patches_of(views[:1, 0])
        side = math.isqrt(N)
        mask_RN = block_mask(mask_key, B * V, side, N // side, ratio=mask_ratio, prob=mask_prob)

        out, stats = join_crops('dinov2', network, params, extra['stats'], batch, key, mask=mask_RN)
        taught, target_state = target.views(extra['target'], views)
        tau = ramp(progress, *teacher_temperature, share=sharpen)
        targets_BVK = targets(taught['head'], extra.get('centre'), tau)
        value = cls = losses.swapped(targets_BVK, out['head'], temperature=temperature)

        # Only as many patches of a view as can be masked go through the head.
        most = max(1, math.ceil(mask_ratio[1] * N))
        place_RM = jnp.argsort(~mask_RN, axis=1, stable=True)[:, :most]
        counts_RM = jnp.take_along_axis(mask_RN, place_RM, axis=1)

        def through(params: Tree, stats: Tree, named: Tree) -> tuple[jax.Array, Tree]:
            patches_RND = rearrange(named['patches'], 'b v n d -> (b v) n d')
            chosen = jnp.take_along_axis(patches_RND, place_RM[..., None], axis=1)
            x = rearrange(chosen, 'r m d -> (r m) d')
            return models.apply(patch_head, params[of_patches], stats[of_patches], x, train=True)

        student, stats[of_patches] = through(params, extra['stats'], out['named'])
        teacher, target_state['stats'][of_patches] = through(
            target_state['params'], extra['target']['stats'], taught['named']
        )
        counts = counts_RM.reshape(-1).astype(jnp.float32)
        assigned = targets(teacher, extra.get('patch_centre'), tau, counts)
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
            **losses.target_entropies(targets_BVK),
            'output_std': losses.output_std(cls_BVD[:, 0]),
        }
        total = jnp.where(counts[:, None] > 0, teacher, 0.0).sum(0)
        measured = {
            'teacher': taught['head'].mean((0, 1))[None],
            'masked': (total / jnp.maximum(counts.sum(), 1))[None],
            'count': counts.sum()[None],
        }
        extra = {**extra, 'stats': stats, 'target': target_state}
        return value, Aux(extra, metrics, measured if centring == 'centre' else None)

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        extra = target.follow(params, extra, measured, progress)
        if centring == 'sinkhorn':
            return extra
        moved = {
            'centre': losses.centre(measured['teacher'], extra['centre'], centre_momentum),
            'patch_centre': losses.centre(
                measured['masked'], extra['patch_centre'], centre_momentum, measured['count']
            ),
        }
        return {**extra, **moved}

    return Method(init, loss, target.encode, after, encoders=target.encoders)
