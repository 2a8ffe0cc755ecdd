"""Eight CPU devices for every test, and JAX's strictest rank rules."""

import importlib.metadata
import os

# Before jax is imported anywhere: the backend reads these once.
FLAGS = ['--xla_force_host_platform_device_count=8']
# Compiling is most of the tests' time: with these a fifth of what it is by default. A job of CI
# runs the contract without them.
XLA = os.environ.get('CONTRASTIVE_JAX_XLA', 'quick')
if XLA not in ('quick', 'default'):
    raise ValueError(f"CONTRASTIVE_JAX_XLA: got {XLA!r}, expected 'quick' or 'default'")
if XLA == 'quick':
    FLAGS += ['--xla_backend_optimization_level=0', '--xla_cpu_parallel_codegen_split_count=1']
    # Versions of JAX from 0.11.2 have no such flag, and an unknown flag ends the process.
    if tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2])) < (0, 11):
        FLAGS += ['--xla_cpu_use_fusion_emitters=false']
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


def environment(devices):
    """Variables of a program that is started with so many CPU devices."""
    # Of a flag that is there twice, the last counts.
    flag = f' --xla_force_host_platform_device_count={devices}'
    return {**os.environ, 'XLA_FLAGS': os.environ['XLA_FLAGS'] + flag}


# Minutes each: workers take these files first, so that none has one left when the others are done.
LONG = ('test_methods', 'test_configs', 'test_train', 'test_losses')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)  # stable
