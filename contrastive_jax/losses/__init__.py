"""Pure functions of embeddings. They see the global batch and store no matrix of scores."""

from contrastive_jax.losses.contrastive import clip, info_nce, n_pair, nt_xent, siglip, sup_con
from contrastive_jax.losses.metric import max_margin, triplet

__all__ = ['clip', 'info_nce', 'max_margin', 'n_pair', 'nt_xent', 'siglip', 'sup_con', 'triplet']
