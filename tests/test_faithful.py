"""Four training steps of every method's preset beside the authors' formulas in float64.

Method, optimiser and what follows a step are those of the preset; only widths, the encoder (one
layer, without BatchNorm) and the lengths of warm-up and freezing are small here. The oracles have
the authors' constants as numbers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle as o
import pytest
from oracle import DROP, WARM, B, Oracle

from contrastive_jax.losses import color
from contrastive_jax.methods import jigsaw
from contrastive_jax.models import lab

SMALL = {'hidden': 12, 'projection': 5}


def views_of(batch):
    return batch['views'][:, 0], batch['views'][:, 1]


# Contrastive.


def test_simclr():
    """google-research/simclr, tf2/objective.py: the sum of two means; tf2/lars_optimizer.py."""

    def loss(p, memory, batch, t):
        x = jnp.concatenate(views_of(batch))  # one call, so joint BatchNorm
        z = o.unit(o.mlp(p['projector'], o.encode(p['encoder'], x), 3, last_norm=True))
        scores = z @ z.T / 0.1 - 1e9 * jnp.eye(2 * B)
        label = jnp.arange(2 * B)
        return 2 * o.cross_entropy(scores, (label + B) % (2 * B)), None

    rate = o.for_all(o.rates(4.8, WARM))
    oracle = Oracle(loss, o.lars(rate, 1e-4, classic=True))
    o.check(oracle, o.ours(o.preset('simclr_resnet', 'imagenet'), SMALL))


def test_sup_con():
    """SupContrast, losses.py and main_supcon.py: τ / 0.07 times L_out; all weights decay."""

    def loss(p, memory, batch, t):
        x = jnp.concatenate(views_of(batch))
        z = o.unit(o.mlp(p['projector'], o.encode(p['encoder'], x), 2, norm=False))
        label = jnp.tile(batch['label'], 2)
        others = 1 - jnp.eye(2 * B)
        scores = z @ z.T / 0.1
        log = scores - jnp.log((jnp.exp(scores) * others).sum(1, keepdims=True))
        positive = (label[:, None] == label) * others
        return -0.1 / 0.07 * ((positive * log).sum(1) / positive.sum(1)).mean(), None

    rate = o.for_all(o.rates(0.5, WARM, first=0.01, last=0.5e-3))
    o.check(Oracle(loss, o.sgd(rate, 1e-4)), o.ours(o.preset('sup_con', 'cifar10'), SMALL))


def test_clip():
    """Radford et al. 2021, figure 3; open_clip: AdamW, decay of what has two dimensions."""

    def loss(p, memory, batch, t):
        image = o.encode(p['encoder'], batch['views'][:, 0])
        words = jax.nn.one_hot(batch['text'], o.WORDS, dtype=jnp.float64).mean(1)
        text = o.encode(p['text']['encoder'], words)
        image = o.unit(o.dense(p['projection']['linear1'], image))
        text = o.unit(o.dense(p['text']['projection']['linear1'], text))
        scores = jnp.exp(p['logit_scale']) * image @ text.T
        label = jnp.arange(B)
        return (o.cross_entropy(scores, label) + o.cross_entropy(scores.T, label)) / 2, None

    rate = o.for_all(o.rates(5e-4, WARM))
    oracle = Oracle(loss, o.adamw(rate, lambda t: 0.2, b2=0.98, eps=1e-6))
    run = o.ours(o.preset('clip_vit', 'openai'), {'projection': 5}, views=1, text=True)
    o.check(oracle, run)


def test_siglip():
    """Zhai et al. 2023, algorithm 1; big_vision: decay 1e-4 that follows the schedule alone."""

    def loss(p, memory, batch, t):
        image = o.unit(o.encode(p['encoder'], batch['views'][:, 0]))
        words = jax.nn.one_hot(batch['text'], o.WORDS, dtype=jnp.float64).mean(1)
        text = o.encode(p['text']['encoder'], words)
        text = o.unit(o.dense(p['text']['projection']['linear1'], text))
        scores = jnp.exp(p['logit_scale']) * image @ text.T + p['logit_bias']
        sign = 2 * jnp.eye(B) - 1
        return -jnp.log(1 / (1 + jnp.exp(-sign * scores))).sum() / B, None

    def clip(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        return {name: g / max(norm, 1.0) for name, g in gradients.items()}

    rate = o.for_all(o.rates(1e-3, WARM))
    oracle = Oracle(loss, o.adamw(rate, lambda t: 1e-4 / 1e-3, b2=0.95), clip=clip)
    run = o.ours(o.preset('siglip_vit', 'webli'), {'projection': 6}, views=1, text=True)
    o.check(oracle, run)


@pytest.mark.parametrize('name', ['triplet', 'max_margin', 'n_pair'])
def test_metric_learning(name):
    """FaceNet, eq. 1, and TensorFlow Addons' semi-hard mining; Hadsell et al., eq. 4; Sohn, eq. 6.

    The recipe is this project's: SGD, decay of the kernels alone.
    """

    def loss(p, memory, batch, t):
        x = batch['views'].reshape(-1, 24)
        z = o.dense(p['projector']['linear1'], o.encode(p['encoder'], x))
        label = jnp.repeat(batch['label'], 2)
        same, itself = label[:, None] == label, jnp.eye(2 * B, dtype=bool)
        if name == 'n_pair':
            anchor, positive = z[::2], z[1::2]
            scores = anchor @ positive.T
            negative = batch['label'][:, None] != batch['label']
            apart = jnp.exp(scores - jnp.diag(scores)[:, None]) * negative
            return jnp.log1p(apart.sum(1)).mean(), None
        z = o.unit(z)
        square = ((z[:, None] - z) ** 2).sum(-1)
        if name == 'max_margin':
            d = jnp.sqrt(jnp.where(itself, 1.0, square))
            terms = jnp.where(same, d**2, jnp.maximum(1.0 - d, 0) ** 2) / 2
            return jnp.where(itself, 0.0, terms).sum() / (2 * B * (2 * B - 1)), None
        # [a, p, n]: the nearest negative beyond the positive, or else the farthest of all.
        far, near = square[:, :, None], square[:, None, :]
        negative = ~same[:, None, :]
        beyond = jnp.where(negative & (near > far), near, jnp.inf).min(2)
        chosen = jnp.where(jnp.isinf(beyond), jnp.where(negative, near, 0.0).max(2), beyond)
        positive = same & ~itself
        terms = jnp.where(positive, jnp.maximum(square - chosen + 0.2, 0.0), 0.0)
        return terms.sum() / positive.sum(), None

    c = o.preset('metric_learning', 'cifar10')
    if name != 'triplet':
        c.method = {'name': 'metric_learning', 'loss': name, 'unit': name != 'n_pair'}
    rate = o.for_all(o.rates(0.06, WARM))
    o.check(Oracle(loss, o.sgd(rate, 5e-4, o.matrices)), o.ours(c, {'projection': 5}))


# Pretext tasks.


def test_rotation():
    """gidariss/FeatureLearningRotNet: dataloader.py's turns, cross-entropy over all of them."""

    def loss(p, memory, batch, t):
        x = batch['views'][:, 0]
        quarter = x.transpose(0, 2, 1, 3)[:, ::-1]  # flipud of the transposed image
        half = x[:, ::-1, ::-1]
        turns = [x, quarter, half, quarter[:, ::-1, ::-1]]
        logits = [o.dense(p['head']['linear'], o.encode(p['encoder'], y)) for y in turns]
        terms = [o.cross_entropy(y, jnp.full(B, k)) for k, y in enumerate(logits)]
        return sum(terms) / 4, None

    rate = o.for_all(o.rates(0.1, drops=[(DROP, 0.02)]))
    run = o.ours(o.preset('rotation', 'cifar10'), {}, views=1, cut=lambda views: views[:, :, :, :2])
    o.check(Oracle(loss, o.sgd(rate, 5e-4, nesterov=True)), run)


def quarters(views):
    """Four tiles of one pixel in height and two in width, row by row."""
    halves = [views[:, 0, i : i + 1, j : j + 2] for i in (0, 1) for j in (0, 2)]
    return np.stack(halves, axis=1)


def tiles_of(p, batch):
    return [o.encode(p['encoder'], batch['views'][:, i]) for i in range(4)]


def test_relative_patch():
    """Doersch et al. 2015, figure 3: of 2 × 2 tiles all twelve pairs; labels row by row."""
    # The second tile's direction from the first: above left 0, above 1, ... left 3, right 4, ...
    table = [(0, 1, 4), (0, 2, 6), (0, 3, 7), (1, 0, 3), (1, 2, 5), (1, 3, 6)]
    table += [(2, 0, 1), (2, 1, 2), (2, 3, 4), (3, 0, 0), (3, 1, 1), (3, 2, 3)]

    def loss(p, memory, batch, t):
        x = tiles_of(p, batch)
        rows = jnp.concatenate([jnp.concatenate([x[a], x[b]], axis=1) for a, b, _ in table])
        label = jnp.repeat(jnp.array([k for *_, k in table]), B)
        return o.cross_entropy(o.mlp(p['head'], rows, 2), label), None

    rate = o.for_all(o.rates(0.1, WARM))
    run = o.ours(o.preset('relative_patch', 'imagenet'), {'hidden': 12}, views=1, cut=quarters)
    o.check(Oracle(loss, o.sgd(rate, 1e-4, o.matrices)), run)


def test_jigsaw():
    """VISSL's head: Linear, BatchNorm and ReLU on each tile, a linear layer on all of them.

    Which permutation is drawn is the method's; that tile j is then tile permutation[j] is not.
    """
    table = jigsaw.far_apart(4, 24)
    keys = [
        jax.random.split(jax.random.split(jax.random.fold_in(jax.random.key(3), t))[1])[0]
        for t in range(o.STEPS)
    ]
    drawn = [np.asarray(jax.random.randint(key, (B, 1), 0, 24))[:, 0] for key in keys]

    def loss(p, memory, batch, t):
        each = p['tile']
        x = jnp.stack(tiles_of(p, batch), axis=1)
        x = o.batch_norm(each['norm'], o.dense(each['linear'], x.reshape(4 * B, -1)))
        x = jax.nn.relu(x).reshape(B, 4, -1)
        shuffled = [[x[b, table[k][j]] for j in range(4)] for b, k in enumerate(drawn[t])]
        rows = jnp.stack([jnp.concatenate(row) for row in shuffled])
        return o.cross_entropy(o.dense(p['head']['linear1'], rows), jnp.asarray(drawn[t])), None

    rate = o.for_all(o.rates(0.1, WARM, first=0.025, drops=[(DROP, 0.01)]))
    options = {'permutations': 24, 'tiles': 4, 'width': 5}
    run = o.ours(o.preset('jigsaw', 'imagenet'), options, views=1, cut=quarters)
    o.check(Oracle(loss, o.sgd(rate, 1e-4, o.matrices)), run)


# Distillation.


def test_simsiam():
    """facebookresearch/simsiam: the predictor's rate stays (--fix-pred-lr), all weights decay."""

    def loss(p, memory, batch, t):
        z = [
            o.mlp(p['projector'], o.encode(p['encoder'], x), 3, last_norm=True)
            for x in views_of(batch)
        ]
        h = [o.unit(o.mlp(p['predictor'], x, 2)) for x in z]
        z = [jax.lax.stop_gradient(o.unit(x)) for x in z]
        return -((h[0] * z[1]).sum(-1).mean() + (h[1] * z[0]).sum(-1).mean()) / 2, None

    falling = o.rates(0.1)
    oracle = Oracle(
        loss, o.sgd(lambda t, name: 0.1 if name.startswith('predictor') else falling(t), 1e-4)
    )
    o.check(oracle, o.ours(o.preset('simsiam', 'imagenet'), {**SMALL, 'predictor': 8}))


# Redundancy.


def test_barlow_twins():
    """facebookresearch/barlowtwins, main.py: weights at 0.2, biases and norms at 0.0048."""

    def loss(p, memory, batch, t):
        z = [o.mlp(p['projector'], o.encode(p['encoder'], x), 3) for x in views_of(batch)]
        c = o.batch_norm({}, z[0]).T @ o.batch_norm({}, z[1]) / B
        on = ((jnp.diag(c) - 1) ** 2).sum()
        return on + 0.0051 * ((c**2).sum() - (jnp.diag(c) ** 2).sum()), None

    peak = o.rates(8.0, WARM, last=8e-3)  # 2048 / 256
    vectors = ('bias', 'scale')

    def rate(t, name):
        return peak(t) * (0.0048 if name.endswith(vectors) else 0.2)

    o.check(Oracle(loss, o.lars(rate, 1e-6)), o.ours(o.preset('barlow_twins', 'imagenet'), SMALL))


def test_vicreg():
    """facebookresearch/vicreg, main_vicreg.py."""

    def loss(p, memory, batch, t):
        z = [o.mlp(p['projector'], o.encode(p['encoder'], x), 3) for x in views_of(batch)]
        value = 25 * ((z[0] - z[1]) ** 2).mean()
        for x in z:
            x = x - x.mean(0)
            std = jnp.sqrt((x**2).sum(0) / (B - 1) + 1e-4)
            value += 25 * jnp.maximum(1 - std, 0).mean() / 2
            c = x.T @ x / (B - 1)
            value += ((c**2).sum() - (jnp.diag(c) ** 2).sum()) / 5
        return value, None

    rate = o.for_all(o.rates(1.6, WARM, last=1.6e-3))
    o.check(Oracle(loss, o.lars(rate, 1e-6)), o.ours(o.preset('vicreg', 'imagenet'), SMALL))


def test_lejepa():
    """LeJEPA, algorithms 1 and 2, of two global views and two local ones, in complex numbers.

    BatchNorm of the projector sees all views together, as in MINIMAL.md. AdamW as torch's.
    """
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(3), t))[1] for t in range(o.STEPS)]
    drawn = [np.asarray(jax.random.normal(jax.random.split(k)[0], (4, 5))) for k in keys]
    knots = np.linspace(-5, 5, 17)

    def loss(p, memory, batch, t):
        views = [batch['views'], batch['local_views']]
        x = jnp.concatenate([v.reshape(2 * B, -1) for v in views])
        x = o.dense(p['embedding']['linear1'], o.encode(p['encoder'], x))
        z = o.mlp(p['projector'], x, 3).reshape(2, B, 2, 5)
        z = jnp.concatenate([z[0], z[1]], axis=1)  # [B, 4, 5]
        sim = ((z - z[:, :2].mean(1, keepdims=True)) ** 2).mean()
        terms = []
        for v in range(4):
            for a in np.float64(drawn[t]):
                empirical = jnp.exp(1j * knots * (z[:, v] @ (a / np.linalg.norm(a)))[:, None])
                normal = np.exp(-(knots**2) / 2)
                error = jnp.abs(empirical.mean(0) - normal) ** 2 * normal
                terms.append(jnp.trapezoid(error, knots) * B)
        return 0.95 * sim + 0.05 * jnp.stack(terms).mean(), None

    rate = o.for_all(o.rates(5e-4, WARM, first=5e-6, last=5e-7))
    oracle = Oracle(loss, o.adamw(rate, lambda t: 0.05, o.everything))
    options = {**SMALL, 'embedding': 7, 'directions': 4}
    o.check(oracle, o.ours(o.preset('lejepa', 'imagenet'), options, local=True))


@pytest.mark.parametrize('arg', ['cifar10', 'imagenet'])
def test_supervised(arg):
    """SupContrast, main_ce.py; Goyal et al. 2017, section 5.1, but that the bias does not decay."""

    def loss(p, memory, batch, t):
        logits = o.dense(p['head']['linear'], o.encode(p['encoder'], batch['views'][:, 0]))
        return o.cross_entropy(logits, batch['label']), None

    update = o.sgd(o.for_all(o.rates(0.8, WARM, first=0.01, last=8e-4)), 1e-4)
    if arg == 'imagenet':
        rate = o.for_all(o.rates(3.2, WARM, first=0.1, drops=[(DROP, 0.32)]))
        update = o.sgd(rate, 1e-4, o.matrices, nesterov=True)
    o.check(Oracle(loss, update), o.ours(o.preset('supervised', arg), {'classes': 4}, views=1))


# Reconstruction.


def test_mae():
    """facebookresearch/mae, models_mae.py, main_pretrain.py: what has two dimensions decays."""

    def loss(p, memory, batch, t):
        key = jax.random.split(jax.random.fold_in(jax.random.key(3), t))[1]
        noise = jax.random.uniform(jax.random.split(key)[0], (B, 8), jnp.float32)
        values = []
        for image, order in zip(batch['views'][:, 0], np.argsort(noise, axis=1), strict=True):
            pixels = image.reshape(8, 3)
            x = (pixels + np.arange(8)[:, None] / 8)[order[:2]]
            seen = jnp.tanh(o.dense(p['encoder']['linear'], x))
            drawn = o.mae_decoder(p['decoder'], seen.mean(0), seen, order, 2, 4, 2)
            values.append(o.mae_loss(drawn, pixels, order, 2))
        return jnp.stack(values).mean(), None

    rate = o.for_all(o.rates(2.4e-3, WARM))
    oracle = Oracle(loss, o.adamw(rate, lambda t: 0.05, o.matrices, b2=0.95))
    small = {'width': 8, 'depth': 2, 'heads': 2, 'dtype': 'float32'}
    run = o.ours(o.preset('mae', 'imagenet'), small, views=1, model=o.Pixels())
    o.check(oracle, run, part=o.without_keys)


class Quarters(nn.Module):
    """tanh(x W) of each quarter of an image of 8 × 8 pixels, as a map of 2 × 2."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 2, 2, 48)
        x = jnp.tanh(nn.Dense(6, use_bias=False, name='linear')(x))
        return x.mean((1, 2)), {'map': x}


def eights(views):
    """Two views above each other, every pixel four times: 8 × 8."""
    x = np.concatenate([views[:, 0], views[:, 1]], axis=1) / 4
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, None]


def test_context_encoder():
    """pathak22/context-encoder, train.lua: one step of both players, the critic's a tenth."""
    colour = np.array([117, 104, 123]) * 2 / 255 - 1
    inner = np.zeros((1, 8, 8, 1), bool)
    inner[:, 3:5, 3:5] = True  # of the 4 × 4 of the centre a border of 1 is seen
    weight = np.where(inner, 1.0, 10.0)[:, 2:6, 2:6]

    def verdict(p, x):
        x = o.leaky(o.down(p['block1']['kernel'], x))
        return 1 / (1 + jnp.exp(-x.reshape(B, -1) @ p['out']['kernel']))

    def loss(p, memory, batch, t):
        x = batch['views'][:, 0]
        cells = np.where(inner, colour, x).reshape(B, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        y = jnp.tanh(o.dense(p['encoder']['linear'], cells.reshape(B, 4, 48))).reshape(B, -1)
        d = p['decoder']
        y = o.leaky(o.normed(d['bottleneck_norm'], o.dense(d['bottleneck'], y)))
        y = o.dense(d['spread'], y).reshape(B, 2, 2, -1)
        y = jnp.tanh(o.up(d['out']['kernel'], jax.nn.relu(o.normed(d['norm0'], y))))
        true, stop = x[:, 2:6, 2:6], jax.lax.stop_gradient
        l2 = (weight * (y - true) ** 2).mean()
        fooled = -jnp.log(verdict(stop(p['critic']), y)).mean()
        real, fake = verdict(p['critic'], true), verdict(p['critic'], stop(y))
        criticism = -jnp.log(real).mean() - jnp.log(1 - fake).mean()
        return 0.999 * l2 + 0.001 * fooled + criticism, None

    def rate(t, name):
        return 0.0002 if name.startswith('critic') else 0.002

    small = {'width': 2, 'bottleneck': 5, 'overlap': 1}
    run = o.ours(o.preset('context_encoder', 'imagenet'), small, model=Quarters(), cut=eights)
    o.check(Oracle(loss, o.adamw(rate, lambda t: 0.0, b1=0.5)), run)


# Colours.


class Places(nn.Module):
    """tanh(x W + b) of each pixel, and the mean."""

    @nn.compact
    def __call__(self, x, train=False):
        x = jnp.tanh(nn.Dense(6, name='linear')(x))
        return x.mean((1, 2)), {'map': x}


def of_parts(*sees):
    return lab.Lab(sees, Places)


def in_lab(batch):
    """Lab's own values of what networks see."""
    return {'lab': batch['views'] * 50 + np.float32([50, 0, 0])}


CENTRES = np.float64(color.bins())
ADAM = o.adamw(o.for_all(o.rates(3e-5, drops=[(DROP, 3e-6)])), lambda t: 1e-3, b2=0.99)


def test_colorization():
    """richzhang/colorization, train/, but for 5 neighbours; λ as in eq. 4."""

    def loss(p, memory, batch, t):
        x = batch['views'][:, 0, ..., :1]
        found = o.places(p['colours'], jnp.tanh(o.dense(p['encoder']['L']['linear'], x)))
        target = o.soft_encoding(batch['lab'][:, 0, ..., 1:], CENTRES, 5)
        label = target.argmax(-1)
        weight = o.class_weights(memory['prior'], CENTRES)[label]
        error = -(target * jax.nn.log_softmax(found)).sum(-1)
        return (weight * error).mean(), np.bincount(label.ravel(), minlength=len(CENTRES))

    def after(p, memory, counts, t):
        return {**memory, 'prior': 0.99 * memory['prior'] + 0.01 * counts / counts.sum()}

    run = o.ours(
        o.preset('colorization', 'imagenet'),
        {'width': 8},
        views=1,
        model=of_parts('L'),
        also=in_lab,
    )
    o.check(Oracle(loss, ADAM, after), run, keys=('prior',))


def test_split_brain():
    """Zhang et al. 2017, section 3.1: two cross-entropies that share nothing; no weights."""

    def loss(p, memory, batch, t):
        light, colours = batch['views'][:, 0, ..., :1], batch['views'][:, 0, ..., 1:]
        true = batch['lab'][:, 0]
        x = jnp.tanh(o.dense(p['encoder']['L']['linear'], light))
        log = jax.nn.log_softmax(o.places(p['head_ab'], x))
        value = -(o.soft_encoding(true[..., 1:], CENTRES, 5) * log).sum(-1).mean()
        x = jnp.tanh(o.dense(p['encoder']['ab']['linear'], colours))
        level = np.clip(np.floor(true[..., 0]), 0, 99).astype(int)
        logits = o.places(p['head_L'], x).reshape(-1, 100)
        return value + o.cross_entropy(logits, level.ravel()), None

    config = o.preset('split_brain', 'imagenet')
    run = o.ours(config, {'width': 8}, views=1, model=of_parts('L', 'ab'), also=in_lab)
    o.check(Oracle(loss, ADAM), run)
