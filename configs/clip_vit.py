"""CLIP with a ViT, and LiT.

    python -m contrastive_jax.main --config=configs/clip_vit.py --workdir=runs/clip

Presets: those of images and captions and `:openai` (docs/presets.md).
"""

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config

CLIP = {
    'name': 'clip',
    'projection': 512,
    'temperature': 0.07,
    'locked': False,
    'same_text': 'negative',
}


def digits(c: Config) -> None:
    recipes.grids(c, steps=1500)
    c.method = {**CLIP, 'projection': 64}


def flickr8k(c: Config) -> None:
    recipes.flickr8k(c, steps=6000)
    c.method = {**CLIP, 'projection': 256}


def captions(c: Config) -> None:
    recipes.captions(c)
    c.method = CLIP


def webdataset(c: Config) -> None:
    """OpenCLIP's optimiser for CC3M (batch 1024, 1e-3, 30 epochs) with a ViT-S/16."""
    recipes.captions(c, batch=1024, source='webdataset')
    c.data.holdout = 0.001
    c.method = CLIP
    c.optim.update({'warmup': 0.12, 'b1': 0.9, 'b2': 0.98, 'eps': 1e-6})
    c.optim.decayed = recipes.TABLES_TOO


def openai(c: Config) -> None:
    """ViT-B/32 (the paper's tables 18 and 19; OpenCLIP's defaults): batch 32768, 32 epochs.

    Give it a tokenizer, `--config.inputs.text.tokenizer=bpe_simple_vocab_16e6.txt.gz`: none should
    be trained on so much.
    """
    webdataset(c)
    c.batch_size, c.total_epochs, c.data.holdout = 32_768, 32.0, 1e-5
    like = {'activation': 'quick_gelu', 'epsilon': 1e-5, 'dtype': 'bfloat16'}
    c.model = {'name': 'vit', 'size': 'B', 'patch': 32, 'position': 'learned', **like}
    c.model.update({'norm_pre': True, 'patch_bias': False})
    text = {'width': 512, 'depth': 12, 'heads': 8, **like}
    recipes.text_tower(c, vocabulary=49_408, length=77, **text)
    # The rate is 5e-4 for the whole batch.
    c.optim.update({'learning_rate': 5e-4 / 128, 'weight_decay': 0.2, 'warmup': 0.00512})


def lit(c: Config) -> None:
    """The image encoder stays as a run of config.model's kind has left it; texts come to it."""
    captions(c)
    c.method = {**CLIP, 'projection': 384, 'locked': True}


def get_config(arg: str | None = None) -> Config:
    presets = (digits, flickr8k, captions, webdataset, openai, lit)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
