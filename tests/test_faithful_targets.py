"""As test_faithful.py, of methods that remember: targets, queues, centres, clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle as o
import pytest
from oracle import FROZEN, TOTAL, WARM, B, Oracle

from contrastive_jax.augment import masking
from contrastive_jax.methods import dinov2, ijepa

SMALL = {'hidden': 12, 'projection': 5}


def views_of(batch):
    return batch['views'][:, 0], batch['views'][:, 1]


def followed(memory, p, m):
    return {'target': {**memory['target'], 'params': o.ema(memory['target']['params'], p, m)}}


def project(p, x, layers=1, **norms):
    return o.mlp(p['projector'], o.encode(p['encoder'], x), layers, **norms)


# Contrastive.


@pytest.mark.parametrize(
    ('arg', 'layers', 'tau', 'm', 'peak', 'decay'),
    [('cifar10', 1, 0.1, 0.99, 0.06, 5e-4), ('imagenet', 2, 0.2, 0.999, 0.03, 1e-4)],
)
def test_moco(arg, layers, tau, m, peak, decay):
    """facebookresearch/moco, moco/builder.py, and its notebook: both directions, added."""
    directions = 2 if arg == 'cifar10' else 1

    def loss(p, memory, batch, t):
        value, keys = 0.0, []
        for a, b in (views_of(batch), views_of(batch)[::-1])[:directions]:
            q = o.unit(project(p, a, layers, norm=False))
            k = o.unit(project(memory['target']['params'], b, layers, norm=False))
            scores = jnp.concatenate([(q * k).sum(1)[:, None], q @ memory['queue'].T], 1)
            value += o.cross_entropy(scores / tau, jnp.zeros(B, int))
            keys.append(k)
        return value, jnp.stack(keys, 1).reshape(-1, 5)

    def after(p, memory, keys, t):
        queue = jnp.concatenate([memory['queue'][len(keys) :], keys])
        return {**memory, **followed(memory, p, m), 'queue': queue}

    oracle = Oracle(loss, o.sgd(o.for_all(o.rates(peak)), decay), after)
    run = o.ours(o.preset('moco', arg), {**SMALL, 'queue': 32})
    o.check(oracle, run, ('target', 'queue'))


@pytest.mark.parametrize('arg', ['imagenet', 'imagenet_resnet'])
def test_moco_v3(arg):
    """facebookresearch/moco-v3, moco/builder.py; there m is the next step's, a shift of one."""
    vit = arg == 'imagenet'
    layers, tau = (3, 0.2) if vit else (2, 1.0)

    def loss(p, memory, batch, t):
        q = [
            o.unit(o.mlp(p['predictor'], project(p, x, layers, last_norm=True), 2, last_norm=vit))
            for x in views_of(batch)
        ]
        target = memory['target']['params']
        k = [o.unit(project(target, x, layers, last_norm=True)) for x in views_of(batch)]
        scores = (q[0] @ k[1].T / tau, q[1] @ k[0].T / tau)
        return sum(2 * tau * o.cross_entropy(s, jnp.arange(B)) for s in scores), None

    def after(p, memory, measured, t):
        return followed(memory, p, o.rising(0.99, t))

    update = o.lars(o.for_all(o.rates(4.8, WARM)), 1e-6)
    if vit:
        update = o.adamw(o.for_all(o.rates(2.4e-3, WARM)), lambda t: 0.1, o.everything)
    run = o.ours(o.preset('moco_v3', arg), SMALL)
    o.check(Oracle(loss, update, after), run, ('target',))


def test_nnclr():
    """Dwibedi et al. 2021, eq. 3 and section 3.2; the authors published no code."""

    def loss(p, memory, batch, t):
        z = [project(p, x, 3, last_norm=True) for x in views_of(batch)]
        h = [o.unit(o.mlp(p['predictor'], x, 2)) for x in z]
        z = [jax.lax.stop_gradient(o.unit(x)) for x in z]
        near = [memory['queue'][(x @ memory['queue'].T).argmax(1)] for x in z]
        scores = (near[0] @ h[1].T / 0.1, near[1] @ h[0].T / 0.1)
        return sum(o.cross_entropy(s, jnp.arange(B)) for s in scores) / 2, z[0]

    def after(p, memory, z, t):
        return {**memory, 'queue': jnp.concatenate([memory['queue'][B:], z])}

    oracle = Oracle(loss, o.lars(o.for_all(o.rates(4.8, WARM)), 1e-6, classic=True), after)
    run = o.ours(o.preset('nnclr', 'imagenet'), {**SMALL, 'queue': 32, 'predictor': 12})
    o.check(oracle, run, ('queue',))


def test_pcl():
    """Li et al. 2021, eq. 11: MoCo's loss, and the mean over clusterings of that of prototypes."""
    rng = np.random.default_rng(5)
    given = [
        {
            'prototypes': jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32),
            'concentration': jnp.asarray(rng.uniform(0.05, 0.3, len(x)), jnp.float32),
            'assignment': jnp.asarray(rng.integers(0, len(x), 20), jnp.int32),
        }
        for x in (rng.normal(size=(6, 5)), rng.normal(size=(9, 5)))
    ]

    def loss(p, memory, batch, t):
        a, b = views_of(batch)
        q = o.unit(project(p, a, 2, norm=False))
        k = o.unit(project(memory['target']['params'], b, 2, norm=False))
        scores = jnp.concatenate([(q * k).sum(1)[:, None], q @ memory['queue'].T], 1)
        value = o.cross_entropy(scores / 0.1, jnp.zeros(B, int))
        for found in memory['clusterings']:
            scores = q @ found['prototypes'].T / found['concentration']
            value += o.cross_entropy(scores, found['assignment'][batch['index']]) / 2
        return value, k

    def after(p, memory, keys, t):
        queue = jnp.concatenate([memory['queue'][B:], keys])
        return {**memory, **followed(memory, p, 0.99), 'queue': queue}

    oracle = Oracle(loss, o.sgd(o.for_all(o.rates(0.06)), 5e-4), after)
    run = o.ours(
        o.preset('pcl', 'cifar10'),
        {**SMALL, 'queue': 32, 'clusters': (6, 9)},
        extra=lambda extra: {**extra, 'clustered': jnp.ones((), bool), 'clusterings': given},
    )
    o.check(oracle, run, ('target', 'queue'))


# Distillation.


def test_byol():
    """deepmind-research, byol/byol_experiment.py and utils/optimizers.py."""

    def loss(p, memory, batch, t):
        h = [o.unit(o.mlp(p['predictor'], project(p, x, 2), 2)) for x in views_of(batch)]
        z = [o.unit(project(memory['target']['params'], x, 2)) for x in views_of(batch)]
        return ((h[0] - z[1]) ** 2).sum(1).mean() + ((h[1] - z[0]) ** 2).sum(1).mean(), None

    def after(p, memory, measured, t):
        return followed(memory, p, o.rising(0.99, t))

    oracle = Oracle(loss, o.lars(o.for_all(o.rates(4.8, WARM)), 1e-6), after)
    o.check(oracle, o.ours(o.preset('byol', 'imagenet'), SMALL), ('target',))


def dino_head(p, x):
    """DINOHead: an MLP, length 1, a linear layer with weight norm. Theirs: the exact GELU."""
    x = o.unit(o.mlp(p['mlp'], x, 3, norm=False, activation=jax.nn.gelu))
    return x @ o.unit(p['last']['kernel'].T).T * p['last'].get('length', 1.0)


def crops_of(batch):
    return [x[:, v] for x in (batch['views'], batch['local_views']) for v in range(2)]


def pairs(targets, logits, tau=0.1):
    """The mean over pairs of a teacher's view and another view of the student."""
    terms = [
        -(t * jax.nn.log_softmax(s / tau)).sum(1).mean()
        for i, t in enumerate(targets)
        for j, s in enumerate(logits)
        if i != j
    ]
    return sum(terms) / len(terms)


def falling(start, end):
    return lambda t: end + (start - end) * (1 + np.cos(np.pi * t / TOTAL)) / 2


def clip_to_3(gradients):
    """`(norm, gradients) -> gradients`: torch's clip_grad_norm_ of some tensors together."""
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {name: g * min(1.0, 3.0 / (norm + 1e-6)) for name, g in gradients.items()}


def thaws(name):
    return FROZEN if 'head/last' in name or name.startswith('prototypes') else 0


HEAD = {'hidden': 12, 'bottleneck': 5, 'prototypes': 7, 'head_std': None}


def test_dino():
    """facebookresearch/dino, main_dino.py and utils.py."""

    def loss(p, memory, batch, t):
        target = memory['target']['params']
        logits = [dino_head(p['head'], o.encode(p['encoder'], x)) for x in crops_of(batch)]
        taught = [
            dino_head(target['head'], o.encode(target['encoder'], x)) for x in views_of(batch)
        ]
        tau = 0.04 if t < TOTAL / 10 else 0.07  # 30 of 300 epochs
        targets = [jax.nn.softmax((x - memory['centre']) / tau) for x in taught]
        return pairs(targets, logits), jnp.concatenate(taught)

    def after(p, memory, taught, t):
        centre = 0.9 * memory['centre'] + 0.1 * taught.mean(0)
        return {**followed(memory, p, o.rising(0.996, t)), 'centre': centre}

    def clip(gradients):
        return {k: v for name, g in gradients.items() for k, v in clip_to_3({name: g}).items()}

    rate = o.for_all(o.rates(2e-3, WARM, last=1e-6))
    oracle = Oracle(loss, o.adamw(rate, falling(0.04, 0.4)), after, clip, thaws)
    o.check(oracle, o.ours(o.preset('dino', 'imagenet'), HEAD, local=True), ('target', 'centre'))


def test_dinov2(monkeypatch):
    """facebookresearch/dinov2, train/ssl_meta_arch.py, loss/ and vitl16_short.yaml.

    Theirs: moments of the frozen layer see its gradients while its rate is 0; here: they begin at
    the thaw. Layer decay is test_optim's.
    """
    mask = np.zeros((2 * B, 4), bool)
    for row in range(0, 2 * B, 3):
        mask[row, [row % 4, (row + 1 + row % 3) % 4]] = True
    mask[1, 2] = True
    monkeypatch.setattr(dinov2, 'block_mask', lambda *args, **options: jnp.asarray(mask))

    def encode(p, x, hidden=None):
        patches = x.reshape(len(x), 4, -1)
        if hidden is not None:
            patches = jnp.where(hidden[:, :, None], p['mask_token'], patches)
        patches = o.dense(p['linear'], patches)
        return jnp.tanh(patches.mean(1)), jnp.tanh(patches)

    def koleo(x):
        x = o.unit(x)
        nearest = (x @ x.T - 2 * jnp.eye(B)).argmax(1)
        return -jnp.log(jnp.sqrt(((x - x[nearest]) ** 2).sum(1)) + 1e-8).mean()

    def loss(p, memory, batch, t):
        target, tau = memory['target']['params'], 0.04 + 0.03 * t / (0.3 * TOTAL)
        of_views = [mask[v::2] for v in range(2)]
        seen = [encode(p['encoder'], x, m) for x, m in zip(views_of(batch), of_views, strict=True)]
        taught = [encode(target['encoder'], x) for x in views_of(batch)]
        local = [encode(p['encoder'], x)[0] for x in crops_of(batch)[2:]]
        logits = [dino_head(p['head'], x) for x in [seen[0][0], seen[1][0], *local]]
        cls = [dino_head(target['head'], x[0]) for x in taught]
        value = pairs([jax.nn.softmax((x - memory['centre']) / tau) for x in cls], logits)
        hidden = []
        for m, s, h in zip(of_views, seen, taught, strict=True):
            rows, _ = np.nonzero(m)
            hidden.append(dino_head(target['head'], h[1][m]))
            aim = jax.nn.softmax((hidden[-1] - memory['patch_centre']) / tau)
            log = jax.nn.log_softmax(dino_head(p['head'], s[1][m]) / 0.1)
            value += -((aim * log).sum(1) / m.sum(1)[rows]).sum() / (2 * B)
            value += 0.1 * koleo(s[0])
        return value, (jnp.concatenate(cls).mean(0), jnp.concatenate(hidden).mean(0))

    def after(p, memory, means, t):
        memory = {**memory, **followed(memory, p, o.rising(0.992, t))}
        for name, mean in zip(('centre', 'patch_centre'), means, strict=True):
            memory[name] = 0.9 * memory[name] + 0.1 * mean
        return memory

    def clip(gradients):
        modules = {name.split('/')[0] for name in gradients}
        parts = [{k: g for k, g in gradients.items() if k.startswith(f'{m}/')} for m in modules]
        return {k: g for part in parts for k, g in clip_to_3(part).items()}

    rate = o.for_all(o.rates(0.004 * 2**0.5, WARM, last=1e-6))
    oracle = Oracle(loss, o.adamw(rate, falling(0.04, 0.4)), after, clip, thaws)
    c = o.preset('dinov2', 'imagenet')
    c.optim.update(layer_decay=1.0, patch_embedding_rate=1.0)
    run = o.ours(c, HEAD, local=True, model=o.Eye(masked=True))
    o.check(oracle, run, ('target', 'centre', 'patch_centre'))


def test_swav():
    """facebookresearch/swav, main_swav.py, and apex's LARC; prototypes are of length 1 within."""

    def sinkhorn(scores):
        q = jnp.exp(scores / 0.05).T
        for _ in range(3):
            q = q / q.sum(1, keepdims=True) / q.shape[0]
            q = q / q.sum(0, keepdims=True) / q.shape[1]
        return jax.lax.stop_gradient(q * q.shape[1]).T

    def loss(p, memory, batch, t):
        prototypes = o.unit(p['prototypes']['kernel'].T).T
        x = jnp.concatenate(crops_of(batch))
        z = o.unit(project(p, x, 2)).reshape(4, B, -1)  # the head sees all crops together
        queued = memory['seen'][-1:] if t else []
        targets = []
        for v in range(2):
            rows = jnp.concatenate([z[v], *(x[v] for x in queued)])
            targets.append(sinkhorn(rows @ prototypes)[:B])
        return pairs(targets, list(z @ prototypes)), z[:2]

    def after(p, memory, z, t):
        return {'seen': [*memory.get('seen', []), z]}

    oracle = Oracle(loss, o.lars(o.for_all(o.rates(0.6, last=6e-4)), 1e-6, o.everything), after)
    oracle = oracle._replace(begins=thaws)
    options = {**SMALL, 'prototypes': 6, 'queue': B, 'queue_from': 0.0}
    o.check(oracle, o.ours(o.preset('swav', 'imagenet_256'), options, local=True))


def test_ijepa(monkeypatch):
    """facebookresearch/ijepa, src/train.py and in1k_vith14_ep300.yaml; momentum rises linearly.

    There the schedules of rate and decay are one step ahead.
    """
    context = np.array([[i % 8, (i + 5) % 8] for i in range(B)])
    targets = np.array([[[(i + 1) % 8, (i + 2) % 8], [(i + 6) % 8, (i + 2) % 8]] for i in range(B)])
    masks = masking.Blocks(*map(jnp.asarray, (np.int32(context), np.int32(targets), [True, True])))
    monkeypatch.setattr(ijepa, 'multi_block', lambda *args, **options: masks)

    def encode(p, image):
        return jnp.tanh(o.dense(p['linear'], image.reshape(8, 3) + np.arange(8)[:, None] / 8))

    def loss(p, memory, batch, t):
        terms = []
        for image, seen, blocks in zip(batch['views'][:, 0], context, targets, strict=True):
            wanted = o.normalised(encode(memory['target']['params']['encoder'], image))
            patches = encode(p['encoder'], image)[seen]
            for block in blocks:
                drawn = o.ijepa_predictor(p['predictor'], patches, seen, block, 2, 4, 2)
                terms.append(o.smooth_l1(drawn, wanted[block]).mean())
        return jnp.stack(terms).mean(), None

    def after(p, memory, measured, t):
        return {**memory, **followed(memory, p, 0.996 + 0.004 * t / TOTAL)}

    rate = o.for_all(o.rates(1e-3, WARM, first=2e-4, last=1e-6))
    oracle = Oracle(loss, o.adamw(rate, falling(0.04, 0.4)), after)
    small = {'width': 8, 'depth': 2, 'heads': 2, 'dtype': 'float32'}
    run = o.ours(o.preset('ijepa', 'imagenet'), small, views=1, model=o.Pixels())
    o.check(oracle, run, ('target',), part=o.without_keys)
