"""Pure functions of embeddings. Contrastive ones see the global batch and store no matrix."""

from contrastive_jax.losses.contrastive import info_nce, nt_xent

__all__ = ['info_nce', 'nt_xent']
