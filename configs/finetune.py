"""Fine-tuning a masked autoencoder with all labels, and a linear probe of it, as in MAE's paper.

    python -m contrastive_jax.main --config=configs/finetune.py --workdir=runs/tuned

Starts from the encoder of `--config.init_from=RUN`, at first runs/mae; its `config.model` must be
this one's. Presets: docs/presets.md; the authors' are FINETUNE.md of facebookresearch/mae.
"""

from typing import Any

from contrastive_jax import config as config_lib
from contrastive_jax import recipes
from contrastive_jax.config import Config


def digits(c: Config) -> None:
    recipes.digits_vit(c, steps=400)
    c.model.update({'patch': 2, 'cls_token': True, 'start': 'mae'})
    c.optim.update({'learning_rate': 2e-3, 'layer_decay': 0.65})
    tuned(c, 10)


def imagenet(c: Config) -> None:
    """ViT-L, 50 epochs: 85.9 %.

    Authors' code: RandAugment and random erasing; here: neither. There patches are averaged in
    front of a new LayerNorm; here: behind the encoder's own. There positions learn; here: they stay
    as in pretraining.
    """
    recipes.imagenet_vit(c, epochs=50.0, batch=1024, size='L')
    c.inputs.crop.update({'scale': (0.08, 1.0), 'interpolation': 'bicubic'})
    c.model.update({'activation': 'gelu', 'start': 'mae', 'pool': 'mean', 'cls_token': True})
    c.model.drop_path = 0.2
    c.optim = {'name': 'adamw', 'learning_rate': 1e-3, 'weight_decay': 0.05, 'warmup': 5 / 50}
    c.optim.update({'layer_decay': 0.75, 'final_fraction': 1e-6 / 4e-3})
    tuned(c, 1000, mixup=0.8, cutmix=1.0, label_smoothing=0.1, head_std=2e-5)


def base(c: Config) -> None:
    """ViT-B, 100 epochs: 83.6 %. It goes with `configs/mae.py:imagenet --config.model.size=B`."""
    imagenet(c)
    c.total_epochs, c.model.size, c.model.drop_path = 100.0, 'B', 0.1
    c.optim.update(learning_rate=5e-4, layer_decay=0.65, warmup=5 / 100, final_fraction=5e-4)


def probe(c: Config) -> None:
    """The linear probe of ViT-L, 50 epochs: 75.8 %."""
    imagenet(c)
    c.batch_size, c.model.pool, c.model.drop_path = 16384, 'cls', 0.0
    tuned(c, 1000, locked=True, batch_norm=True, head_std=0.01)
    recipes.torch_lars(c, 0.1, 0.0, warmup=10 / 50)


def tuned(c: Config, classes: int, **options: Any) -> None:
    c.inputs.views, c.inputs.augment, c.init_from = 1, {}, 'runs/mae'
    c.method = {'name': 'supervised', 'classes': classes, **options}
    c.evals = {'classifier': {}, 'knn': {}}


def folder(c: Config) -> None:
    imagenet(c)
    recipes.folder(c)


def get_config(arg: str | None = None) -> Config:
    presets = (digits, imagenet, base, probe, folder)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
