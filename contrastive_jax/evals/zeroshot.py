"""Zero-shot classification: the class whose name, put into sentences, is nearest to the image.

N: images, C: classes, T: templates, D: embedding dimensions.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from contrastive_jax import config, evaluation, parallel
from contrastive_jax.config import UserError
from contrastive_jax.evals import retrieval
from contrastive_jax.evaluation import Evaluate, percent
from contrastive_jax.evaluation.subject import Subject

WHERE = 'config.evals.zeroshot'
PROMPTS = epath.Path(__file__).parent / 'prompts'


def make(
    classes: Sequence[str] | str | None = None,
    templates: Sequence[str] | str = ('a photo of a {}.',),
    prompts: str = '',
    k: Sequence[int] = (1, 5),
    per_class: bool = False,
    split: str = 'test',
    label: str = 'label',
) -> Evaluate:
    """The zero-shot classifier of CLIP.

    A class's weights are the mean over templates of its unit text embeddings; images are
    classified by the cosine. A class that scores the same as the right one ranks before it.

    Args:
        classes: names in label order, or a file of them: JSON, or text with one a line. Without,
            those of prompts; without these, the data's own, '_' read as a space.
        templates: sentences with '{}' where the name goes.
        prompts: a file of prompts/ by its name ('cifar10') or a JSON file of your own:
            {"classes": [...], "templates": [...]}; its templates come before those above. Either
            may be missing.
        k: the right class counts if it is among so many; those above C are left out.
        per_class: also the accuracy of every class, and their mean.
        split: whose images; those without a label are left out.
        label: the one of the data's labels that is predicted.

    Returns:
        `evaluate(subject)`, which yields 'top<k>', and with per_class 'top1/<the data's name>' of
        every class that has images, and 'mean_per_class' over them. Nothing where there are no
        texts or no labels. Raises UserError where the names cannot be the data's classes.

    Raises:
        UserError: a value outside its range; a template without '{}'; a file that does not exist
            or holds something else.

    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision,
    section 3.1.
    """
    retrieval.check_k(WHERE, k)
    file = _read_prompts(prompts) if prompts else {}
    if isinstance(classes, str) and classes:
        path = epath.Path(classes)
        classes = _strings('classes', path, _read('classes', path))
    names = list(classes or file.get('classes', ()))
    templates = file.get('templates') or ([templates] if isinstance(templates, str) else templates)
    for template in templates or ['']:
        if '{}' not in template:
            raise UserError(f'{WHERE}.templates: got {template!r}; expected {{}} for the name.')
    if twice := len(names) - len(set(names)):
        logging.warning('%s.classes: names of more than one class (%d) never win', WHERE, twice)
    say = evaluation.missed('Zero-shot classification')

    def evaluate(subject: Subject) -> Iterator[tuple[str, float]]:
        if reason := _missing(subject, split, label):
            say(reason)
            return
        own = subject.classes[label]
        check(names, own)
        x_ND, label_N = subject.features(split, 'embedding', label)
        labelled = np.flatnonzero(label_N >= 0)
        x_ND, label_N = parallel.to_host(x_ND)[labelled], label_N[labelled]
        called = names or [name.replace('_', ' ') for name in own]
        text_CD = class_embeddings(subject, called, templates)
        rank_N = retrieval.ranks(subject.mesh, x_ND, label_N, text_CD, np.arange(len(text_CD)))
        for n in k:
            if n <= len(text_CD):
                title = evaluation.titled('zeroshot', label) + (f', top {n}' if n > 1 else '')
                yield f'top{n}', percent((rank_N <= n).mean(), title)
        if per_class:
            present = np.unique(label_N)
            right = [float((rank_N[label_N == c] == 1).mean()) for c in present]
            for c, accuracy in zip(present, right, strict=True):
                yield f'top1/{own[c]}', accuracy
            yield 'mean_per_class', float(np.mean(right))

    return evaluate


def class_embeddings(
    subject: Subject, classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """[C, D] float64: means over templates of unit embeddings."""
    texts = [template.replace('{}', name) for name in classes for template in templates]
    x_CTD = retrieval.embed(subject, texts).astype(np.float64)
    x_CTD = x_CTD.reshape(len(classes), len(templates), -1)
    norm_CT1 = np.linalg.norm(x_CTD, axis=2, keepdims=True)
    return (x_CTD / np.where(norm_CT1 > 0, norm_CT1, 1)).mean(1)


def check(names: Sequence[str], classes: Sequence[str]) -> None:
    """Raises UserError where names (none: the data's own) cannot be those of the data's classes."""
    if names and len(names) != len(classes):
        raise UserError(
            f'{WHERE}.classes: got {len(names)} names ({_some(names)}); expected one for each of '
            f'the {len(classes)} classes of the data ({_some(classes)}).'
        )
    ours, theirs = ([c.casefold().replace('_', ' ') for c in some] for some in (names, classes))
    if sorted(ours) == sorted(theirs) and ours != theirs:
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise UserError(
            f"{WHERE}.classes: the names are those of the data in another order: label {at}'s is "
            f'{names[at]!r}; expected {classes[at]!r}.'
        )


def _missing(subject: Subject, split: str, label: str) -> str:
    """Why there is nothing to evaluate, or ''."""
    if not subject.reads_text:
        return 'the encoder reads no text'
    if split not in subject.splits:
        return f'there is no {split} split'
    if label not in subject.classes:
        return f'the data has no label {label!r}' if subject.classes else 'the data has no labels'
    if not (subject.features(split, 'embedding', label).label_N >= 0).any():
        return f'no image of the {split} split has a label'
    return ''


def _read_prompts(name: str) -> dict[str, list[str]]:
    shipped = sorted(path.stem for path in PROMPTS.glob('*.json'))
    if name not in shipped and not name.endswith('.json'):
        raise config.unknown('name', name, [*shipped, 'PATH.json'], f'{WHERE}.prompts')
    path = PROMPTS / f'{name}.json' if name in shipped else epath.Path(name)
    found = _read('prompts', path)
    if not isinstance(found, dict) or not {'classes', 'templates'} & set(found):
        raise UserError(
            f'{WHERE}.prompts: {path} holds no {{"classes": [...], "templates": [...]}}.'
        )
    return {k: _strings('prompts', path, found.get(k, [])) for k in ('classes', 'templates')}


def _read(key: str, path: epath.Path) -> Any:
    """Reads a JSON file, or the lines of another."""
    try:
        text = path.read_text()
        if path.suffix == '.json':
            return json.loads(text)
    except (OSError, ValueError) as e:
        raise UserError(f'{WHERE}.{key}: {path} cannot be read: {e}.') from e
    return [line.strip() for line in text.splitlines() if line.strip()]


def _strings(key: str, path: epath.Path, found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
        raise UserError(f'{WHERE}.{key}: {path} holds something else than a list of strings.')
    return found


def _some(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:3])) + (', …' if len(names) > 3 else '')
