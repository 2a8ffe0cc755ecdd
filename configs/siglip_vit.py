"""SigLIP with a ViT, and SigLiT.

    python -m contrastive_jax.main --config=configs/siglip_vit.py --workdir=runs/siglip

Presets: those of images and captions and `:webli` (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

BOTH_WAYS = {'causal': False}  # every token of a text sees every other
START = {'logit_scale': 10.0, 'logit_bias': -10.0}
SIGLIP = {'name': 'siglip', 'projection': 768, 'same_text': 'negative', **START}
SMALL_BATCH = {**SIGLIP, 'logit_bias': -2.71}  # −10 is for thousands: more pairs do not match


def digits(c: Config) -> None:
    recipes.grids(c, steps=1500)
    c.text.update(BOTH_WAYS)
    c.method = {**SMALL_BATCH, 'projection': 64}


def flickr8k(c: Config) -> None:
    recipes.flickr8k(c, steps=4000)
    c.method = {**SMALL_BATCH, 'projection': 256}


def captions(c: Config) -> None:
    recipes.captions(c)
    c.text.update(BOTH_WAYS)
    c.method = SIGLIP


def webdataset(c: Config) -> None:
    recipes.captions(c, batch=1024, source='webdataset')
    c.text.update(BOTH_WAYS)
    c.method, c.data.holdout = SIGLIP, 0.001
    c.optim.update({'warmup': 0.02, 'b2': 0.95, 'clip_norm': 1.0})


def webli(c: Config) -> None:
    """ViT-B/16 at the paper's batch and rate; lengths, heads and what decays are big_vision's.

    The authors' decay of 1e-4 is not multiplied by the rate, ours is. Give it a tokenizer,
    `--config.inputs.text.tokenizer=PATH`.
    """
    webdataset(c)
    c.method = {**SIGLIP, 'project_images': False}
    c.batch_size, c.total_epochs, c.data.holdout = 32_768, 1.0, 1e-5
    c.microbatch = 8192  # whole, the batch does not fit 64 v5e chips or 32 H100
    c.inputs.mean = c.inputs.std = (0.5, 0.5, 0.5)
    c.model.update({'size': 'B', 'pool': 'map', 'position': 'learned'})
    text = {'width': 768, 'depth': 12, 'heads': 12, 'dtype': 'bfloat16', **BOTH_WAYS}
    recipes.text_tower(c, vocabulary=32_000, length=64, **text)
    # The rate is 1e-3 for the whole batch.
    c.optim.update({'learning_rate': 1e-3 / 128, 'weight_decay': 0.1, 'decayed': ('kernels',)})


def lit(c: Config) -> None:
    """SigLiT on captions of one's own: rate, warm-up and start of big_vision's COCO example."""
    captions(c)
    locked = {'projection': 384, 'project_images': False, 'locked': True}
    c.batch_size, c.method = 512, {**SMALL_BATCH, **locked}
    c.optim.update({'learning_rate': 5e-4, 'warmup': 0.03, 'clip_norm': 1.0})


def get_config(arg: str | None = None) -> Config:
    presets = (digits, flickr8k, captions, webdataset, webli, lit)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
