"""A hang of XLA's CPU runtime in JAX alone, written as a report for JAX's tracker.

    python benchmarks/xla_cpu_rendezvous.py [jit|shard_map] [--order]

**CPU: collectives after a `while` loop may start before those within it: hang, segmentation fault**

The program has an all-reduce in a `lax.scan` and, after it, another that does not need the scan's
result. On two CPU devices, of which one is a little late, it hangs within the first runs: XLA says
`rendezvous.cc: Termination timeout for all reduce … Expected 2 threads to join the rendezvous, but
only 1 of them arrived on time`, of one device in op_id=1 and of another in op_id=2, and aborts. As
`shard_map`, where every `psum` has the same `channel_id`, different all-reduces meet, and the
process dies of a segmentation fault. With `--order` the later all-reduce needs the scan's result,
and all runs pass. Seen with jax and jaxlib 0.10.2 on Linux, x86-64.

The cause, as we read the sources of `xla/backends/cpu/runtime`: all collectives of a program use
one communicator resource, for which `ExecutionGraph` puts *scheduling* edges between thunks, in the
program's order. `ThunkExecutor` takes such an edge as done once the thunk has been executed, even
if its event is still pending (`ProcessScheduledOutEdges`). A collective has then joined its
rendezvous. A `WhileThunk` has not: its event is pending as soon as its first turn waits for other
threads, before the collectives of its body have joined theirs. So later collectives may run first.
Each of them blocks a thread of the pool that the devices share, which has as many threads as there
are cores; where one device blocks two of two, the other one never arrives. With more threads
(NPROC=16) it does not hang, but runs slower, and `shard_map` dies as before. A thunk with
collectives nested in it would need *execution* edges.

We met it where a ResNet's training step on two virtual devices and two cores sums gradients in a
scan: most starts hung. `--xla_cpu_enable_concurrency_optimized_scheduler=false` helped there, since
loops that reuse each other's buffers are in order, but a program with loops and other collectives
hung with it, too.
"""

import argparse
import os

# A pool of two threads on any machine.
os.environ['NPROC'] = '2'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=2'
    ' --xla_cpu_collective_call_terminate_timeout_seconds=20'
)

import jax
import jax.numpy as jnp
import jaxlib
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('style', nargs='?', default='jit', choices=('jit', 'shard_map'))
    parser.add_argument('--order', action='store_true')
    args = parser.parse_args()
    print(f'jax {jax.__version__}, jaxlib {jaxlib.__version__}', flush=True)
    mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
    rows = PartitionSpec('data')
    kernels = jax.random.normal(jax.random.key(0), (4, 256, 256)) / 16

    def local(function):
        return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)

    def late(x):
        turns = lax.axis_index('data') * 200
        return lax.fori_loop(0, turns, lambda i, x: jnp.sin(x), x)

    def total(x):
        return lax.psum(x.sum(0), 'data') if args.style == 'shard_map' else x.sum(0)

    def layer(x):
        # Several products, of which threads of the pool take some: the sum is then on one of these.
        x = jnp.tanh(sum(jnp.sin(x * k) @ kernels[k] for k in range(4)))
        return jnp.tanh(x + total(x) / 100)

    def program(x):
        x = late(x) if args.style == 'shard_map' else local(late)(x)
        y = lax.scan(lambda y, _: (layer(y), None), x, length=2)[0]
        return y, layer(y if args.order else x + 1)

    step = jax.jit(local(program) if args.style == 'shard_map' else program)
    x = jax.device_put(jnp.ones((512, 256)), NamedSharding(mesh, rows))
    for i in range(20):
        jax.block_until_ready(step(x))
        print(f'run {i + 1} of 20', flush=True)


if __name__ == '__main__':
    main()
