"""Evaluators for a finished run, other than its own.

    python -m contrastive_jax.main --config=configs/eval.py:labels --workdir=runs/first --eval_only

| preset | what |
|---|---|
| `:quick` (the default) | kNN, linear probe, k-means clusters, uniformity, rank; all pictures |
| `:labels` | kNN, linear probe and fine-tuning with 1 % and 10 % of the labels and 10 a class |
| `:layers` | a linear probe of every block or stage |
| `:full` | all of these, and retrieval and zero-shot where there are texts |
| `:speech` | kNN, linear probe and a map of spoken digits' log power, without a run |

Fine-tuning trains the encoder many times (3 learning rates, 3 draws, and as often from random
weights), minutes to hours on a CPU: `--config.evals.finetune.draws=1` and the other options of
`contrastive_jax.evals.finetune.make` say how much.

Method, model, views and data are those of the run in the workdir. Another data set is looked at
with `--config.data.source=folder --config.data.root=DIR`; its records go to `RUN/on_folder_DIR`. Of
an evaluator that the run itself did not have (or not with these options), raw pixels and the
weights that the run started from are evaluated, too.
"""

from contrastive_jax import config as config_lib
from contrastive_jax.config import Config

FEW = {'per_class': (10,), 'fractions': (0.01, 0.1)}
TUNE = {**FEW, 'draws': 3, 'epochs': 60.0, 'learning_rates': (3e-4, 1e-3, 3e-3), 'min_steps': 200}
OUTPUTS = ('features', 'block*', 'last4*', 'stage*', 'map*')


def quick(c: Config) -> None:
    c.evals = {
        'knn': {'per_class': (), 'confusion': True},
        'linear': {'per_class': ()},
        **{name: {} for name in ('clustering', 'uniformity', 'collapse')},
        **{name: {} for name in ('attention', 'pca', 'tsne', 'neighbours', 'patches', 'filters')},
    }


def labels(c: Config) -> None:
    c.evals = {'knn': FEW, 'linear': FEW, 'finetune': TUNE}


def layers(c: Config) -> None:
    c.evals = {'linear': {'outputs': OUTPUTS, 'per_class': ()}}


def full(c: Config) -> None:
    quick(c)
    c.evals.knn.update(FEW)
    c.evals.update({'linear': {'outputs': OUTPUTS, **FEW}, 'finetune': TUNE})
    c.evals.update({'retrieval': {}, 'zeroshot': {}})


def speech(c: Config) -> None:
    """Digits and speakers by the spectrum alone: what an encoder of recordings has to beat.

    Of the Free Spoken Digit Dataset in --config.data.root; --workdir is a new one.
    """
    c.data.source = 'recordings:{digit}_{speaker}_*'
    c.inputs = {'name': 'waveform', 'rate': 8000, 'seconds': 1.0, 'views': 1}
    for label in ('digit', 'speaker'):
        for name in ('knn', 'linear', 'tsne'):
            c.evals[f'{name}_{label}'] = {'name': name, 'label': label}


def get_config(arg: str | None = None) -> Config:
    presets = (quick, labels, layers, full, speech)
    return config_lib.preset({p.__name__: p for p in presets}, arg)
