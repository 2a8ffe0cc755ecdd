"""Layers, optimisers and the loop of the authors' formulas in float64: no code of the package.

An oracle's parameters and memory are nested dicts with the package's names; what it computes from
them is stated anew, from the papers and the authors' code. JAX differentiates it, in float64.
"""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from contrastive_jax import config, optim, state

CONFIGS = Path(__file__).parents[1] / 'configs'
STEPS, TOTAL, B = 3, 10, 8  # of TOTAL steps the first STEPS are taken, on B records
WARM, FROZEN = 2, 2  # steps, where a preset has a warm-up or freezes a module
DROP = 2  # step at which the rate falls, where a preset has milestones
MORE = 1e4  # times the decay of SGD and LARS, which would be lost in float32's rounding
WORDS = 9


class Eye(nn.Module):
    """tanh(x W + b) on an image, or on a text's counts of words; with patches where masks are."""

    out: int = 6
    masked: bool = False

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        if x.ndim == 2:
            x = jax.nn.one_hot(x, WORDS).mean(1)
        if not self.masked:
            return jnp.tanh(nn.Dense(self.out, name='linear')(x.reshape(len(x), -1))), {}
        patches = x.reshape(len(x), 4, -1)
        if mask is not None:
            token = self.param('mask_token', nn.initializers.normal(1.0), (1, 1, patches.shape[2]))
            patches = jnp.where(mask[:, :, None], token, patches)
        patches = nn.Dense(self.out, name='linear')(patches)
        cls = jnp.tanh(patches.mean(1))
        return cls, {'cls': cls, 'patches': jnp.tanh(patches)}


class Pixels(nn.Module):
    """tanh(x W + b) of each pixel that is kept, at its place, and of their mean."""

    @nn.compact
    def __call__(self, x, train=False, keep=None):
        x = x.reshape(len(x), 8, 3) + jnp.arange(8.0)[None, :, None] / 8
        x = x if keep is None else jnp.take_along_axis(x, keep[:, :, None], 1)
        patches = jnp.tanh(nn.Dense(6, name='linear')(x))
        cls = patches.mean(1)
        return cls, {'cls': cls, 'patches': patches}


# Layers.


def dense(p, x):
    return x @ p['kernel'] + p.get('bias', 0.0)


def encode(p, x):
    return jnp.tanh(dense(p['linear'], x.reshape(len(x), -1)))


def unit(x):
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True))


def batch_norm(p, x, eps=1e-5):
    """torch's BatchNorm in training: biased variance; scale and offset where there are any."""
    x = (x - x.mean(0)) / jnp.sqrt(((x - x.mean(0)) ** 2).mean(0) + eps)
    return x * p.get('scale', 1.0) + p.get('bias', 0.0)


def mlp(p, x, layers, norm=True, last_norm=False, activation=jax.nn.relu):
    for i in range(1, layers + 1):
        x = dense(p[f'linear{i}'], x)
        if last_norm if i == layers else norm:
            x = batch_norm(p.get(f'norm{i}', {}), x)
        x = activation(x) if i < layers else x
    return x


def layer_norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p['scale'] + p['bias']


def gelu(x):
    return x * (1 + jax.lax.erf(x / np.sqrt(2))) / 2


def block(p, x, heads):
    """A pre-norm transformer block on one image's tokens [T, D], head by head."""
    width = x.shape[-1]
    q, k, v = jnp.split(dense(p['attention']['qkv'], layer_norm(p['norm1'], x)), 3, axis=-1)
    mixed = []
    for h in range(heads):
        at = slice(h * width // heads, (h + 1) * width // heads)
        scores = q[:, at] @ k[:, at].T / np.sqrt(width / heads)
        mixed.append(jax.nn.softmax(scores, axis=-1) @ v[:, at])
    x = x + dense(p['attention']['out'], jnp.concatenate(mixed, -1))
    return x + dense(p['mlp2'], gelu(dense(p['mlp1'], layer_norm(p['norm2'], x))))


def blocks(p, x, heads):
    for i in range(sum(name.startswith('block') for name in p)):
        x = block(p[f'block{i}'], x, heads)
    return layer_norm(p['norm'], x)


def sincos(rows, columns, width):
    """Fixed positions of MoCo v3 and MAE: a quarter each for sine and cosine of row and column."""
    w = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    places = np.ndindex(rows, columns)
    return np.stack([np.concatenate([f(a * w) for a in at for f in (np.sin, np.cos)])
                     for at in places])  # fmt: skip


def mae_decoder(p, cls, seen, order, rows, columns, heads):
    """mae/models_mae.py, forward_decoder, of one image; order: its patches, those seen first."""
    x = [p['mask_token'][0, 0]] * len(order)
    for token, patch in zip(dense(p['embedding'], seen), order, strict=False):
        x[patch] = token
    x = jnp.stack(x) + sincos(rows, columns, x[0].shape[0])
    x = jnp.concatenate([dense(p['embedding'], cls)[None], x])
    return dense(p['out'], blocks(p, x, heads))[1:]


def mae_loss(drawn, patches, order, count):
    """mae/models_mae.py, forward_loss with norm_pix_loss: one image, `count` patches seen."""
    mean, variance = patches.mean(-1, keepdims=True), patches.var(-1, keepdims=True, ddof=1)
    target = (patches - mean) / (variance + 1e-6) ** 0.5
    return ((drawn - target) ** 2).mean(-1)[order[count:]].mean()


def leaky(x):
    return jnp.where(x > 0, x, 0.2 * x)


def normed(p, x, averages=None):
    """torch's BatchNorm of maps or vectors, of the batch's statistics or of averages."""
    axes = tuple(range(x.ndim - 1))
    mean, var = (x.mean(axes), x.var(axes)) if averages is None else averages.values()
    return (x - mean) / jnp.sqrt(var + 1e-5) * p['scale'] + p['bias']


def down(kernel, x):
    """A convolution 4 x 4, stride 2, padding 1, as sums over the kernel's places."""
    h, w = x.shape[1] // 2, x.shape[2] // 2
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        x[:, a : a + 2 * h : 2, b : b + 2 * w : 2] @ kernel[a, b] for a, b in np.ndindex(4, 4)
    )


def up(kernel, x):
    """A transposed one: pixel i adds to pixels 2i − 1 … 2i + 2 of twice as large a map.

    Ours holds its kernel as one of 2 x 2 places that gives 2 x 2 pixels.
    """
    h, w, out = x.shape[1], x.shape[2], kernel.shape[-1] // 4
    k = kernel.reshape(2, 2, -1, 2, 2, out)
    y = jnp.zeros((len(x), 2 * h + 2, 2 * w + 2, out))
    for u, v, p, q in np.ndindex(2, 2, 2, 2):
        a, b = 2 - 2 * u + p, 2 - 2 * v + q
        y = y.at[:, a : a + 2 * h : 2, b : b + 2 * w : 2].add(x @ k[u, v, :, p, q])
    return y[:, 1:-1, 1:-1]


def ijepa_predictor(p, seen, context, block, rows, columns, heads):
    """ijepa/src/models/vision_transformer.py, of one image and one block; both are places."""
    x = dense(p['embedding'], seen)
    at = sincos(rows, columns, x.shape[1])
    x = jnp.concatenate([x + at[context], p['mask_token'][0] + at[block]])
    return dense(p['out'], blocks(p, x, heads))[len(context) :]


def normalised(h):
    """ijepa/src/train.py: F.layer_norm of each patch, torch's epsilon."""
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def smooth_l1(a, b):
    """torch's."""
    d = jnp.abs(a - b)
    return jnp.where(d < 1, d**2 / 2, d - 0.5)


def conv3(p, x):
    """A convolution 3 x 3 with zeros around the maps [B, h, w, D]."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(x[:, i : i + h, j : j + w] @ p['kernel'][i, j] for i, j in np.ndindex(3, 3))


def places(p, x):
    """One hidden layer and a linear one at every place of maps."""
    x = conv3(p['conv0'], x)
    rows = batch_norm(p['norm0'], x.reshape(-1, x.shape[-1]))
    return dense(p['out'], jax.nn.relu(rows)).reshape(*x.shape[:3], -1)


def soft_encoding(ab, centres, count):
    """Zhang et al. 2016, section 2.2: Gaussian weights, σ 5, of the nearest centres."""
    square = ((np.float64(ab)[..., None, :] - centres) ** 2).sum(-1)
    far = square > np.sort(square, -1)[..., count - 1 : count]
    weight = np.where(far, 0, np.exp(-(square - square.min(-1, keepdims=True)) / 50))
    return weight / weight.sum(-1, keepdims=True)


def class_weights(prior, centres, uniform=0.5):
    """The same, eq. 4; what a bin's Gaussian, σ 5, would give to no bin stays with the others."""
    spread = np.exp(-((centres[:, None] - centres) ** 2).sum(-1) / 50)
    smooth = (spread / spread.sum(0)) @ np.float64(prior)
    weight = 1 / ((1 - uniform) * smooth + uniform / len(centres))
    return weight / (smooth * weight).sum()


def cross_entropy(logits, label):
    """torch's: the mean over rows of −log softmax at the label."""
    return -(jax.nn.log_softmax(logits)[jnp.arange(len(logits)), label]).mean()


# Optimisers: `(t, name, gradient, weight, state) -> (weight, state)` of one array.


def rates(peak, warm=0, first=0.0, last=0.0, drops=()):
    """Linear from `first` to `peak` in `warm` steps, then half a cosine to `last`.

    With `drops`, from these steps on the next lower rate, in the cosine's place: [(step, rate)].
    """

    def rate(t):
        if t < warm:
            return first + (peak - first) * t / warm
        if drops:
            return [peak, *(r for step, r in drops if t >= step)][-1]
        return last + (peak - last) * (1 + np.cos(np.pi * (t - warm) / (TOTAL - warm))) / 2

    return rate


def matrices(name, w):
    """The authors' `ndim > 1`: neither biases nor norms nor temperatures."""
    return w.ndim > 1


def everything(name, w):
    return True


def sgd(rate, decay, decays=everything, momentum=0.9, nesterov=False):
    """torch.optim.SGD."""

    def update(t, name, g, w, s):
        d = g + MORE * decay * w * decays(name, w)
        s = {'d': momentum * s['d'] + d if s else d}
        return w - rate(t, name) * (d + momentum * s['d'] if nesterov else s['d']), s

    return update


def lars(rate, decay, decays=matrices, momentum=0.9, trust=1e-3, classic=False):
    """LARS as in simclr/tf2/lars_optimizer.py (classic) or main_barlow.py, moco-v3, vicreg."""

    def update(t, name, g, w, s):
        if decays(name, w):
            g = g + MORE * decay * w
            norms = np.linalg.norm(w), np.linalg.norm(g)
            g = g * (trust * norms[0] / norms[1] if min(norms) > 0 else 1.0)
        s = {'d': momentum * s.get('d', 0.0) + (rate(t, name) if classic else 1.0) * g}
        return w - (1.0 if classic else rate(t, name)) * s['d'], s

    return update


def adamw(rate, decay, decays=matrices, b1=0.9, b2=0.999, eps=1e-8):
    """Loshchilov and Hutter 2019, algorithm 2; `decay(t)` is multiplied by the rate."""

    def update(t, name, g, w, s):
        n = s.get('n', 0) + 1
        m = b1 * s.get('m', 0.0) + (1 - b1) * g
        v = b2 * s.get('v', 0.0) + (1 - b2) * g**2
        direction = m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + eps)
        direction = direction + decay(t) * w * decays(name, w)
        return w - rate(t, name) * direction, {'n': n, 'm': m, 'v': v}

    return update


def for_all(rate):
    return lambda t, name: rate(t)


def ema(moving, online, m):
    """θ' ← m θ' + (1 − m) θ, of the modules that `moving` has."""
    online = {name: online[name] for name in moving}
    return jax.tree.map(lambda a, b: m * a + (1 - m) * b, moving, online)


def rising(start, t):
    """BYOL's, MoCo v3's and DINO's momentum: from `start` to 1 by half a cosine."""
    return 1 - (1 - start) * (np.cos(np.pi * t / TOTAL) + 1) / 2


class Oracle(NamedTuple):
    """A method as its authors have it.

    Attributes:
        loss: `(p, memory, batch, t) -> (value, measured)`.
        update: an optimiser.
        after: `(p, memory, measured, t) -> memory`, after the optimiser.
        clip: `gradients -> gradients`, of a flat dict.
        begins: `name -> t`: the step at which an array begins to learn, 0 of most.
    """

    loss: Any
    update: Any
    after: Any = lambda p, memory, measured, t: memory
    clip: Any = lambda gradients: gradients
    begins: Any = lambda name: 0


def preset(file, arg):
    """A config with MORE decay, WARM steps of warm-up and FROZEN ones of its frozen modules.

    Where its rate falls in steps, it does so once, after DROP of them.
    """
    c = runpy.run_path(str(CONFIGS / f'{file}.py'))['get_config'](arg).unlock()
    if c.optim.name in ('sgd', 'lars'):
        c.optim.weight_decay *= MORE
    if c.optim.get('warmup'):
        c.optim.warmup = WARM / TOTAL
    if c.optim.get('milestones'):
        c.optim.milestones = (DROP / TOTAL,)
    for changes in c.optim.get('modules', {}).values():
        if 'frozen' in changes:
            changes.frozen = FROZEN / TOTAL
    return c


def batches(seed=0):
    """STEPS batches whose classes differ, so that gradients are far from 0."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        label = rng.permutation([0, 0, 0, 1, 1, 2, 2, 3]).astype(np.int32)
        means = np.random.default_rng(7).normal(size=(4, 1, 2, 4, 3))
        views = means[label] + 0.7 * rng.normal(size=(B, 4, 2, 4, 3))
        text = rng.integers(0, WORDS, (B, 5)).astype(np.int32)
        yield {
            'views': views[:, :2].astype(np.float32),
            'local_views': views[:, 2:].astype(np.float32),
            'text': text,
            'label': label,
            'index': rng.permutation(20)[:B].astype(np.int32),
        }


def ours(c, options, views=2, local=False, text=False, model=None, extra=None, cut=None, also=None):
    """States before and after STEPS steps of the package, and the batches.

    Args:
        c: a config whose `method` and `optim` count; 'options' are for its method, too.
        views, local, text: what of the batches it is given.
        model: its encoder.
        extra: `extra -> extra` at the start.
        cut: `views -> views` of a batch.
        also: `batch -> arrays` that it is given, too.
    """
    options = {**c.method.to_dict(), **options, **({'text': Eye(5)} if text else {})}
    method = config.build('methods', options, 'test', model or Eye())
    tx, _ = optim.make(**c.optim.to_dict(), total_steps=TOTAL, batch_size=c.batch_size)
    given = [{**b, 'views': b['views'][:, :views]} for b in batches()]
    if cut:
        given = [{**b, 'views': cut(b['views'])} for b in given]
    if also:
        given = [{**b, **also(b)} for b in given]
    if not local:
        given = [{k: v for k, v in b.items() if k != 'local_views'} for b in given]
    before = jax.jit(state.make_init(method, tx, seed=3, records=20))(given[0])
    if extra:
        before = before._replace(extra=extra(before.extra))
    step = jax.jit(state.make_step(method, tx, lambda key, batch: batch, 3, TOTAL))
    after = before
    for batch in given:
        after, _ = step(after, batch)
    return before, after, given


def theirs(oracle, before, given):
    """`(parameters, memory)` after the same steps of the oracle, from the same start."""
    with jax.enable_x64(True), jax.numpy_rank_promotion('allow'):
        wide = jax.tree.map(_wide, (before.params, before.extra, given))
        p, memory, given = wide
        states: dict[str, Any] = {}
        for t, batch in enumerate(given):
            take = jax.value_and_grad(oracle.loss, has_aux=True)
            (_, measured), gradients = take(p, memory, batch, t)
            flat, moved = flatten_dict(p, sep='/'), {}
            gradients = oracle.clip(flatten_dict(gradients, sep='/'))
            for name, w in flat.items():
                if t < oracle.begins(name):
                    moved[name] = w
                    continue
                g = gradients[name]
                moved[name], states[name] = oracle.update(t, name, g, w, states.get(name, {}))
            p = unflatten_dict(moved, sep='/')
            memory = oracle.after(p, memory, measured, t)
        return jax.tree.map(np.asarray, (p, memory))


def _wide(x):
    return jnp.asarray(np.asarray(x), jnp.float64 if x.dtype == jnp.float32 else x.dtype)


def check(oracle, run, keys=(), tolerance=1e-4, part=lambda name, x: x):
    """Asserts that all arrays moved as the oracle's did.

    Each is compared by the distance of the two ends over the oracle's distance from the start.

    Args:
        oracle: the method.
        run: of `ours`.
        keys: of `extra` that are compared, too; of 'target' the parameters.
        tolerance: of that share, beside the rounding of the array itself in each step.
        part: `(name, array) -> array`, what of it is compared: where the gradient is 0, Adam makes
            steps of rounding.
    """
    before, after, given = run
    p, memory = theirs(oracle, before, given)

    def chosen(params, extra):
        kept = {k: extra[k]['params'] if k == 'target' else extra[k] for k in keys}
        return {**params, **kept}

    old, new = (chosen(s.params, s.extra) for s in (before, after))
    found = chosen(p, memory)
    flat = (flatten_dict(x, sep='/') for x in (old, new, found))
    old, new, found = ({name: part(name, x) for name, x in tree.items()} for tree in flat)
    assert new.keys() == found.keys()
    apart = {}
    for name, aim in found.items():
        moved = np.linalg.norm(aim - np.asarray(old[name], np.float64))
        assert 0 < moved < np.inf, f'{name}: moved by {moved}'
        rounding = STEPS * np.finfo(np.float32).eps * np.linalg.norm(aim)
        error = np.linalg.norm(np.asarray(new[name], np.float64) - aim)
        apart[name] = max(error - rounding, 0) / moved
    assert max(apart.values()) < tolerance, apart


def without_keys(name, x):
    """For `check`: a bias of a transformer's keys shifts all scores of a query alike, which softmax
    takes away."""
    third = len(x) // 3
    return np.delete(x, np.s_[third : 2 * third]) if name.endswith('qkv/bias') else x
