"""The linear probe's solver beside optax.lbfgs and scikit-learn, and the probe on 1, 2, 8 devices.

    python benchmarks/probe.py [--kinds=well,collinear,scales] [--features=FILE.npz]
        [--rows=2400] [--width=48] [--classes=6] [--strengths=1e4,1e3,...] [--devices=1,2,8]

Every strength is one problem on standardised features, and starts from the solution at the strength
before. Objectives are evaluated in float64; the best known is the lowest of those that are found
and of scikit-learn's newton-cholesky (many weights: lbfgs) in float64 with tol=1e-12. Tables:

- For each kind of features and strength how far the objective is above the best known, as a share
  of it, iterations, and seconds, the least of three runs, without compilation, of
  ours: `evaluation.logistic` at the evaluator's tolerance;
  optax.lbfgs: float32 with our cross-entropy and products as precise. It has no rule to stop by:
  it is given one, the gradient's length in the norm of the Hessian's approximate diagonal, by
  which its variables are scaled, too. At 1e-10 of the objective that keeps it below 1e-6;
  scikit-learn: LogisticRegression(tol=1e-6), float64.
  An iteration is two products with the features (scikit-learn's: a step of L-BFGS).
- The same for 30 small problems solved side by side: 5 sets of 10 rows a class with 5 folds and a
  fit to all. 'above best' is the worst problem's; optax.lbfgs is vmapped, or the problems follow
  one another (lax.map). scikit-learn has no part in this.
- The strength that the evaluator chooses and top-1 of the test set on so many CPU devices, each in
  a process of its own.

FILE.npz holds xt [N, D], lt [N] to train, xe, le to test; −1 is the label of unlabelled rows.
"""

import argparse
import functools
import json
import logging
import os
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from contrastive_jax import parallel
from contrastive_jax.evals import linear
from contrastive_jax.evaluation import logistic, subject

TOLERANCES = {'ours': 1e-9, 'optax': 1e-10}
MOST = 10_000  # iterations
EVERY = 16  # steps of optax.lbfgs after which the stopping rule's diagonal is computed anew
Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Solve = Callable[..., logistic.Solution]


def made(kind: str, args: argparse.Namespace) -> Data:
    """Features of a kind: (train, labels, test, labels)."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(args.classes, args.width))
    label = rng.integers(0, args.classes, args.rows + args.rows // 4)
    # Classes overlap whatever the width.
    x = centres[label] * 4 / args.width**0.5 + rng.normal(size=(len(label), args.width))
    if kind == 'collinear':
        few = args.width // 4
        noise = rng.normal(size=x.shape) * np.geomspace(1e-3, 1e-1, args.width)
        x = x[:, :few] @ rng.normal(size=(few, args.width)) + noise
    elif kind == 'scales':
        x = np.exp(x * np.linspace(0.2, 2, args.width)) * np.geomspace(1e-3, 1e3, args.width)
    x, label = x.astype(np.float32), label.astype(np.int32)
    return x[: args.rows], label[: args.rows], x[args.rows :], label[args.rows :]


def load(kind: str, args: argparse.Namespace) -> Data:
    if kind != 'file':
        return made(kind, args)
    arrays = np.load(args.features)
    return arrays['xt'], arrays['lt'], arrays['xe'], arrays['le']


def standardised(x: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labelled rows, float32 with a last column of 1, and their labels."""
    x, label = x[label >= 0].astype(np.float64), label[label >= 0].astype(np.int32)
    std = x.std(0)
    x = (x - x.mean(0)) / np.where(std > 0, std, 1)
    return np.c_[x, np.ones(len(x))].astype(np.float32), label


def objective(W: np.ndarray, x: np.ndarray, label: np.ndarray, strength: float) -> float:
    W, x = np.asarray(W, np.float64), x.astype(np.float64)
    z = x @ W
    loss = np.logaddexp.reduce(z, axis=1) - z[np.arange(len(x)), label]
    return float(loss.sum() + strength / 2 * (W[:-1] ** 2).sum())


# --- Solvers --------------------------------------------------------------------------------------


def by_optax(x, label, fit, held, strength, W, tolerance, max_iterations):
    """One problem of `logistic.solve` by optax.lbfgs: weights, losses and evaluations."""
    D, C = W.shape
    share_N1 = (fit / fit.sum())[:, None]
    penalty = (strength / fit.sum() * (jnp.arange(D) < D - 1))[:, None]
    true_NC = label[:, None] == jnp.arange(C)[None, :]
    square_D1 = jnp.mean(x**2, 0)[:, None]

    def logits(W):
        z = jnp.matmul(x, W, precision='highest')
        return z - jnp.where(true_NC, z, 0.0).sum(1, keepdims=True)

    def diagonal(W):
        """The Hessian's approximate diagonal, as in ours."""
        r = jnp.abs(logistic._residual(logits(W), true_NC))
        return square_D1 * (share_N1 * r * (1 - r)).sum(0)[None, :] + penalty

    unit = lax.rsqrt(diagonal(W))

    def mean(V):
        W = V * unit
        losses_N = logistic._cross_entropy(logits(W), true_NC)
        return (share_N1[:, 0] * losses_N).sum() + (penalty * W * W).sum() / 2

    optimizer = optax.lbfgs()

    def step(carry):
        i, evaluations, _, h, V, state = carry
        value, gradient = optax.value_and_grad_from_state(mean)(V, state=state)
        h = lax.cond(i % EVERY == 0, lambda: diagonal(V * unit), lambda: h)
        left = ((gradient / unit) ** 2 / h).sum() / 2 / value
        updates, state = optimizer.update(
            gradient, state, V, value=value, grad=gradient, value_fn=mean
        )
        evaluations += optax.tree.get(state, 'info').num_linesearch_steps
        return i + 1, evaluations, left, h, optax.apply_updates(V, updates), state

    V = W / unit
    carry = 0, jnp.int32(1), jnp.inf, jnp.ones_like(W), V, optimizer.init(V)
    unsolved = lambda carry: (carry[2] > tolerance) & (carry[1] < max_iterations)  # noqa: E731
    _, evaluations, _, _, V, _ = lax.while_loop(unsolved, step, carry)
    losses_N = logistic._cross_entropy(logits(V * unit), true_NC)
    return V * unit, (held * losses_N).sum(), mean(V) * fit.sum(), evaluations


@functools.partial(jax.jit, static_argnames='together')
def solve_by_optax(x, label, fit, held, strength, W, tolerance, max_iterations, *, together=False):
    """`logistic.solve` by optax.lbfgs; together: vmapped."""

    def of_set(x, label, *problems):
        def one(*problem):
            return by_optax(x, label, *problem, max_iterations)

        return jax.vmap(one)(*problems) if together else lax.map(lambda p: one(*p), problems)

    given = x, label, fit, held, strength, W, tolerance
    found = jax.vmap(of_set)(*given) if together else lax.map(lambda s: of_set(*s), given)
    return logistic.Solution(*found[:3], found[3].max())


def scikit(x: np.ndarray, label: np.ndarray, strength: float, tol: float, solver: str = 'lbfgs'):
    """(weights, iterations, seconds)"""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(C=1 / strength, tol=tol, max_iter=20_000, solver=solver)
    # Of small problems BLAS's threads mostly wait for each other.
    threads = threadpool_limits(1 if x.size < 2e6 else None)
    with warnings.catch_warnings(), threads:
        warnings.simplefilter('ignore')  # line searches that float64 ends
        start = time.perf_counter()
        model.fit(x[:, :-1].astype(np.float64), label)
        seconds = time.perf_counter() - start
    return np.r_[model.coef_.T, model.intercept_[None]], int(model.n_iter_[0]), seconds


def lowest(x: np.ndarray, label: np.ndarray, strength: float) -> float:
    """The objective that scikit-learn reaches."""
    few = x.shape[1] * (label.max() + 1) < 2000  # weights: their Hessian is small
    W, _, _ = scikit(x, label, strength, 1e-12, 'newton-cholesky' if few else 'lbfgs')
    return objective(W, x, label, strength)


# --- Tables ---------------------------------------------------------------------------------------


def table(*titles: str) -> None:
    print('\n| ' + ' | '.join(titles) + ' |\n|' + '---|' * len(titles), flush=True)


def row(*cells: Any) -> None:
    print('| ' + ' | '.join(map(str, cells)) + ' |', flush=True)


def solvers_titles(names: list[str]) -> list[str]:
    return [title for name in names for title in (f'{name}: above best', 'iterations', 's')]


def cells(above: float, iterations: int, seconds: float) -> list[str]:
    return [f'{max(above, 0):.0e}', str(iterations), f'{seconds:.3f}']


def compare(
    x: np.ndarray,
    label: np.ndarray,
    fit: np.ndarray,
    strengths: list[float],
    solvers: dict[str, Solve],
    theirs: bool,
) -> Iterator[list[str]]:
    """A row for each strength, and one of the seconds of all: problems that `fit` [S, P, N] marks
    of rows x [S, N, D]; with scikit-learn, if `theirs`, of the first."""
    mesh = parallel.make_mesh()
    shape = (*fit.shape[:2], x.shape[2], label.max() + 1)
    W = {name: np.zeros(shape, np.float32) for name in solvers}
    seconds = dict.fromkeys([*solvers, *['scikit-learn'] * theirs], 0.0)
    problems = [
        (s, p, x[s][fit[s, p]], label[s][fit[s, p]])
        for s in range(fit.shape[0])
        for p in range(fit.shape[1])
    ]
    for strength in strengths:
        found: dict[str, tuple[np.ndarray, int, float]] = {}
        full = functools.partial(np.full, fit.shape[:2], dtype=np.float32)
        for name, solve in solvers.items():
            tolerance = full(TOLERANCES[name.split('.')[0]])
            given = x, label, fit, ~fit, full(strength), W[name], tolerance, np.int32(MOST)
            times = []
            with jax.set_mesh(mesh):
                solution = jax.block_until_ready(solve(*given))
                for _ in range(3):
                    start = time.perf_counter()
                    jax.block_until_ready(solve(*given))
                    times.append(time.perf_counter() - start)
            W[name] = np.asarray(solution.W_SPDC)
            found[name] = W[name], int(solution.iterations), min(times)
        if theirs:
            V, *rest = scikit(*problems[0][2:], strength, 1e-6)
            found['scikit-learn'] = (V[None, None], *rest)
        least = np.array([lowest(*problem[2:], strength) for problem in problems])
        values = {
            name: np.array([objective(V[s, p], *rows, strength) for s, p, *rows in problems])
            for name, (V, _, _) in found.items()
        }
        least = np.minimum(least, np.min(list(values.values()), 0))
        line = [f'{strength:g}']
        for name, (_, *rest) in found.items():
            seconds[name] += rest[1]
            line += cells((values[name] / least - 1).max(), *rest)
        yield line
    yield ['all', *[cell for total in seconds.values() for cell in ('', '', f'{total:.3f}')]]


def small_sets(x: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """5 sets of 10 rows a class: rows, labels and which rows the 6 problems of a set are fitted to,
    those of 5 folds and all."""
    sets = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        each = [np.flatnonzero(label == c) for c in range(label.max() + 1)]
        rows = np.concatenate([rng.permutation(r)[:10] for r in each])
        fit = ~linear.folds(label[rows], 5)
        sets.append((x[rows], label[rows], np.concatenate([fit, np.ones_like(fit[:1])])))
    rows, labels, fits = zip(*sets, strict=True)
    return np.stack(rows), np.stack(labels), np.stack(fits)


# --- On so many devices ---------------------------------------------------------------------------


def evaluate(kind: str, args: argparse.Namespace) -> None:
    """Prints the strength that the evaluator chooses on this process's devices, and top-1."""
    x, label, test_x, test_label = load(kind, args)
    mesh = parallel.make_mesh()
    parts = {'train': subject.put(mesh, x, label), 'test': subject.put(mesh, test_x, test_label)}
    given: Any = types.SimpleNamespace(
        mesh=mesh,
        classes={'label': [str(c) for c in range(label.max() + 1)]},
        weights=None,
        missing=lambda label: '',
        labelled=lambda output, label: parts['train'],
        features=lambda split, *_: parts[split],
    )
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage().rsplit(' ', 1)[-1])
    logger = logging.getLogger('absl')
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    found = dict(linear.make(strengths=args.strengths, per_class=())(given))
    print(json.dumps({'strength': ' '.join(said), 'top1': float(found['top1'])}))


def on_devices(kind: str, count: int) -> dict[str, Any]:
    flags = os.environ.get('XLA_FLAGS', '') + f' --xla_force_host_platform_device_count={count}'
    command = [sys.executable, __file__, *sys.argv[1:], f'--evaluate={kind}']
    env = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--kinds', default='well,collinear,scales')
    parser.add_argument('--features', help='FILE.npz')
    for name, default in (('rows', 2400), ('width', 48), ('classes', 6)):
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--strengths', default=','.join(map(str, linear.STRENGTHS)))
    parser.add_argument('--devices', default='1,2,8')
    parser.add_argument('--evaluate', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.strengths = sorted(map(float, args.strengths.split(',')), reverse=True)
    if args.evaluate:
        return evaluate(args.evaluate, args)
    kinds = [kind for kind in args.kinds.split(',') if kind] + ['file'] * bool(args.features)

    one: dict[str, Solve] = {'ours': logistic.solve, 'optax.lbfgs': solve_by_optax}
    table('features', 'strength', *solvers_titles([*one, 'scikit-learn']))
    for kind in kinds:
        x, label = standardised(*load(kind, args)[:2])
        fit = np.ones((1, 1, len(x)), bool)
        for line in compare(x[None], label[None], fit, args.strengths, one, True):
            row(kind, *line)

    vmapped = functools.partial(solve_by_optax, together=True)
    many = {
        'ours': logistic.solve,
        'optax.lbfgs, vmap': vmapped,
        'optax.lbfgs, map': solve_by_optax,
    }
    print('\n30 small problems side by side')
    table('features', 'strength', *solvers_titles(list(many)))
    for kind in kinds:
        sets = small_sets(*standardised(*load(kind, args)[:2]))
        for line in compare(*sets, args.strengths, many, False):
            row(kind, *line)

    table('features', 'devices', 'strength chosen', 'top-1, %')
    for kind in kinds:
        for count in map(int, args.devices.split(',')):
            found = on_devices(kind, count)
            row(kind, count, found['strength'], f'{100 * found["top1"]:.4f}')


if __name__ == '__main__':
    main()
