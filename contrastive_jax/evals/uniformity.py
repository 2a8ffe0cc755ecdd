"""Alignment and uniformity: positives close, all features spread evenly over the sphere.

N: images, D: features, n: a sample of images.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax import evaluation, parallel, similarity
from contrastive_jax.config import check_range
from contrastive_jax.data import BadRecord
from contrastive_jax.evaluation import Evaluate
from contrastive_jax.evaluation.subject import RECORDS, Subject
from contrastive_jax.inputs import empty
from contrastive_jax.losses.scores import inner, unit


def make(t: float = 2.0, images: int = 1024, seed: int = 0, label: str = 'label') -> Evaluate:
    """Uniformity and alignment of the test images' features (train's where there is no test split).

    Args:
        t: of uniformity's kernel, above 0.
        images: whose augmented views are compared, at most; 0: none. As many as there are, if
            there are fewer; drawn at random.
        seed: of that draw, of crops and of augmentation.
        label: the one of the data's labels that 'class_alignment' goes by.

    Returns:
        `evaluate(subject)`, which yields, of features f of length 1:
        'uniformity': log of the mean of exp(−t ‖f(x) − f(y)‖²) over all pairs of two images; from
        −4t up to 0, which is a collapsed encoder; lower is more even.
        'alignment': mean of ‖f(x) − f(x⁺)‖² over pairs of views, augmented and cropped as the run
        trained; from 0 to 4, lower is closer.
        'class_alignment': the same over all pairs of two images of one class, where there are
        labels.

    Raises:
        UserError: a value outside its range.

    Wang and Isola 2020, arXiv:2005.10242, section 4 (α = 2).
    """
    where = 'config.evals.uniformity'
    check_range(where, {'t': t}, above=0)
    check_range(where, {'images': images}, least=0, whole=True)
    say = evaluation.missed('alignment')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        split = 'test' if 'test' in subject.splits else 'train'
        x_ND, label_N = subject.features(split, label=label)
        with jax.set_mesh(subject.mesh):
            counts_N, lse_N = _potential(x_ND, t)
        counts_N, lse_N = parallel.to_host(counts_N), parallel.to_host(lse_N)
        rows = np.flatnonzero(counts_N)
        pairs = len(rows) * (len(rows) - 1)
        if pairs:
            yield (
                'uniformity',
                float(np.logaddexp.reduce(lse_N[rows].astype(np.float64))) - float(np.log(pairs)),
            )
        if 'views' not in subject.inputs.train.shapes:
            say(f'the inputs give no views but {", ".join(subject.inputs.train.shapes)}')
        elif images and len(rows):
            rng = np.random.default_rng(seed)
            some = np.sort(rng.permutation(rows)[:images])
            if (found := alignment(subject, split, some, seed)) is not None:
                yield 'alignment', found
        if (label_N >= 0).any():
            with jax.set_mesh(subject.mesh):
                size_C, square_C = _class_sums(x_ND, label_N, classes=int(label_N.max()) + 1)
            size_C, square_C = (parallel.to_host(y).astype(np.float64) for y in (size_C, square_C))
            # Σ over the pairs of a class of ‖a − b‖² is 2n² − 2‖Σa‖², and n pairs are of one image.
            if pairs := (size_C * (size_C - 1)).sum():
                yield 'class_alignment', float(2 * (size_C**2 - square_C).sum() / pairs)

    return evaluate


def alignment(subject: Subject, split: str, rows: np.ndarray, seed: int) -> float | None:
    """Mean squared distance of unit features of two augmented views of each of these records.

    Of a method with several views they are the first two; of one with a single view, two draws of
    it. A record's crops depend on the seed and its number alone, its augmentation also on its place
    among the rows. None where no view can be made of any of them.
    """
    train, source = subject.inputs.train, subject.splits[split]
    (name,) = subject.inputs.eval.shapes
    draws = 2 if train.shapes['views'].shape[0] == 1 else 1
    device = jax.jit(train.device)
    total, count = 0.0, 0
    for start in range(0, len(rows), RECORDS):
        crops = empty(train.shapes, RECORDS * draws)
        used = []
        for i, row in enumerate(map(int, rows[start : start + RECORDS])):
            rng = np.random.default_rng([seed, row])
            try:
                made = [train.host(source[row], rng) for _ in range(draws)]
            except BadRecord:
                continue
            used.append(i)
            for draw, one in enumerate(made):
                for key, x in one.items():
                    if key not in train.collate:  # texts are no views
                        crops[key][i * draws + draw] = x
        # Every process makes all of them for itself, on one device.
        with jax.set_mesh(parallel.make_mesh(jax.local_devices()[:1])):
            key = jax.random.fold_in(jax.random.key(seed), start)
            views = np.asarray(device(key, crops)['views'])
        views = views.reshape(RECORDS, -1, *views.shape[2:])[used, :2]
        if not used:
            continue
        x_nVD = subject.of_floats({name: views.reshape(-1, *views.shape[2:])}, 'features')
        x_nVD = x_nVD.astype(np.float64).reshape(*views.shape[:2], -1)
        norm = np.linalg.norm(x_nVD, axis=2, keepdims=True)
        x_nVD = x_nVD / np.where(norm > 0, norm, 1)
        total += ((x_nVD[:, 0] - x_nVD[:, 1]) ** 2).sum()
        count += len(used)
    return float(total / count) if count else None


@jax.jit
def _potential(x_ND: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which rows count (padding is zeros), and log Σ_y exp(−t ‖f(x) − f(y)‖²) over the others."""
    counts_N = (x_ND != 0).any(axis=1)
    items = {'z': unit(x_ND), 'row': jnp.arange(len(x_ND)), 'counts': counts_N}

    def score(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> jax.Array:
        # 2 − 2·cosine of a row and its copy is 0 but for rounding.
        square_mn = jnp.maximum(2 - 2 * inner(a['z'], b['z'], jnp.float32), 0)
        pair_mn = a['row'][:, None] != b['row'][None, :]
        pair_mn &= a['counts'][:, None] & b['counts'][None, :]
        return jnp.where(pair_mn, -t * square_mn, -jnp.inf)

    return counts_N, similarity.logsumexp_symmetric(score, items)


@functools.partial(jax.jit, static_argnames='classes')
def _class_sums(
    x_ND: jax.Array, label_N: jax.Array, *, classes: int
) -> tuple[jax.Array, jax.Array]:
    """Numbers of labelled rows and squared lengths of the sums of their units, by class."""
    counts_N = (label_N >= 0) & (x_ND != 0).any(axis=1)
    z_ND = jnp.where(counts_N[:, None], unit(x_ND), 0.0)
    class_N = jnp.where(counts_N, label_N, 0)
    size_C = jax.ops.segment_sum(counts_N.astype(jnp.float32), class_N, classes)
    sum_CD = jax.ops.segment_sum(z_ND, class_N, classes)
    return size_C, jnp.sum(sum_CD**2, axis=1)
