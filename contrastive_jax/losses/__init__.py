"""Pure functions of embeddings. They see the global batch and store no matrix of scores."""

from contrastive_jax.losses.captions import clip, equal_rows, siglip
from contrastive_jax.losses.contrastive import info_nce, nt_xent, proto_nce, sup_con
from contrastive_jax.losses.distillation import (
    centre,
    cosine_distance,
    masked,
    sinkhorn,
    swapped,
    target_entropies,
    teacher,
)
from contrastive_jax.losses.metric import max_margin, n_pair, triplet
from contrastive_jax.losses.redundancy import (
    barlow_twins,
    koleo,
    lejepa,
    output_std,
    sigreg,
    vicreg,
)
from contrastive_jax.losses.scores import unit

__all__ = [
    'barlow_twins',
    'centre',
    'clip',
    'cosine_distance',
    'equal_rows',
    'info_nce',
    'koleo',
    'lejepa',
    'masked',
    'max_margin',
    'n_pair',
    'nt_xent',
    'output_std',
    'proto_nce',
    'siglip',
    'sigreg',
    'sinkhorn',
    'sup_con',
    'swapped',
    'target_entropies',
    'teacher',
    'triplet',
    'unit',
    'vicreg',
]
