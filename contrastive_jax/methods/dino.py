"""DINO (Caron et al. 2021, https://arxiv.org/abs/2104.14294, Algorithm 1), with multi-crop.

A student predicts, from every crop, what a slowly moving teacher says of the two global ones. The
teacher's outputs are centred, which alone would spread them evenly, and sharpened, which alone
would put all on one output. Evaluators see the teacher. The authors let the head's last layer,
'head/last', learn from the second epoch on: `config.optim.modules`.
"""

import jax
import jax.numpy as jnp

from contrastive_jax import losses, models
from contrastive_jax.config import check_range
from contrastive_jax.layers.heads import DINOHead
from contrastive_jax.method import Aux, Batch, Method, Tree
from contrastive_jax.networks.chain import Chain, join_crops
from contrastive_jax.networks.target import Target, momentum_to_one, ramp


def make(
    model: models.Encoder,
    *,
    temperature: float = 0.1,
    teacher_temperature: tuple[float, float] = (0.04, 0.07),
    sharpen: float = 0.1,
    momentum: float = 0.996,
    centre_momentum: float = 0.9,
    prototypes: int = 65536,
    hidden: int = 2048,
    bottleneck: int = 256,
    head_std: float | None = 0.02,
    batch_norm: bool = False,
    learn_length: bool = False,
) -> Method:
    """DINO around an encoder, for two views and any number of local ones.

    Authors' code: τ_t rises once an epoch; here: every step, because a run may have no epochs.

    Args:
        model: the encoder.
        temperature: τ_s of the student, > 0.
        teacher_temperature: τ_t of the teacher, > 0: at the start, and after `sharpen`.
        sharpen: share of the run in which τ_t rises linearly.
        momentum: of the teacher at the start, from 0 to 1; it rises to 1 by a cosine.
        centre_momentum: of the centre, from 0 to 1.
        prototypes: K, the head's outputs.
        hidden: width of the head's hidden layers.
        bottleneck: dimensions in front of the last layer.
        head_std: of the head's kernels at the start, > 0; None, for narrow heads: LeCun's.
        batch_norm: in the head.
        learn_length: of the prototypes (the authors' `norm_last_layer` is its opposite): better
            with ViT-S, unstable with larger encoders.
    """
    positive = {'temperature': temperature, 'teacher_temperature': min(teacher_temperature)}
    positive |= {} if head_std is None else {'head_std': head_std}
    shares = {'sharpen': sharpen, 'momentum': momentum, 'centre_momentum': centre_momentum}
    check_range('config.method', positive, above=0, who='dino')
    check_range('config.method', shares, least=0, most=1, who='dino')
    head = DINOHead(
        prototypes,
        hidden,
        bottleneck,
        batch_norm=batch_norm,
        learn_length=learn_length,
        std=head_std,
    )
    network = Chain(model, head=head)
    target = Target(network, ('encoder', 'head'), momentum_to_one(momentum))

    def init(key: jax.Array, batch: Batch, records: int) -> tuple[Tree, Tree]:
        params, extra = target.init(key, batch, records)
        return params, {**extra, 'centre': jnp.zeros(prototypes)}

    def loss(
        params: Tree, extra: Tree, batch: Batch, key: jax.Array, progress: jax.Array
    ) -> tuple[jax.Array, Aux]:
        out, stats = join_crops('dino', network, params, extra['stats'], batch, key)
        taught, target_state = target.views(extra['target'], batch['views'])
        tau = ramp(progress, *teacher_temperature, share=sharpen)
        targets_BGK = losses.teacher(taught['head'], extra['centre'], tau)
        value = losses.swapped(targets_BGK, out['head'], temperature=temperature)
        metrics = {
            **losses.target_entropies(targets_BGK),
            'output_std': losses.output_std(out['encoder'][:, 0]),
        }
        extra = {**extra, 'stats': stats, 'target': target_state}
        return value, Aux(extra, metrics, {'teacher': taught['head'].mean((0, 1))[None]})

    def after(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
        extra = target.follow(params, extra, measured, progress)
        centre = losses.centre(measured['teacher'], extra['centre'], centre_momentum)
        return {**extra, 'centre': centre}

    return Method(init, loss, target.encode, after, encoders=target.encoders)
