"""Eight CPU devices for every test, and JAX's strictest rank rules."""

import os

# Before jax is imported anywhere: the backend reads these once.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    + ' --xla_backend_optimization_level=0'  # compiling is most of the tests' time
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
