"""Contrastive and self-supervised pretraining in JAX: one trainer, one file a method.

`contrastive_jax.load(workdir)` opens what was trained.
"""

import time
from typing import TYPE_CHECKING, Any

STARTED = time.monotonic()  # near enough to the process's start to say how long starting took

if TYPE_CHECKING:
    from contrastive_jax.inference import load as load
else:

    def __getattr__(name: str) -> Any:
        """`load`, imported when it is asked for: a mistyped flag need not wait for JAX."""
        if name == 'load':
            from contrastive_jax.inference import load

            return load
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
