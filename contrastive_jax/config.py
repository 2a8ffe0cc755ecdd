"""From names in a config to the modules and functions that they mean, and errors that help.

A config names a method, a model, an evaluator or a data source by its module:
`config.method = dict(name='simclr', temperature=0.1)` becomes
`contrastive_jax.methods.simclr.make(temperature=0.1)`. There is no registry: the files that exist
are the names that exist.
"""

import copy
import difflib
import importlib
import inspect
import json
import math
import numbers
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

# A ConfigDict: its keys are attributes that no type checker can know.
Config = Any


class UserError(ValueError):
    """A mistake that the user can mend: `main` prints the message alone and exits with 2."""


def unknown(what: str, got: object, exists: Iterable[str], where: str = '') -> UserError:
    """The error for a name that does not exist: what was got, what exists, the closest match."""
    exists = list(exists)
    close = difflib.get_close_matches(str(got), exists, n=1, cutoff=0.5)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    listed = ', '.join(map(repr, exists)) or 'none'
    return UserError(
        f'{where}{": " if where else ""}unknown {what} {got!r}.{hint} Exists: {listed}.'
    )


def choose(what: str, got: str, options: Mapping[str, Any], where: str = '') -> Any:
    """`options[got]`, or an error that lists the options."""
    if got not in options:
        raise unknown(what, got, options, where)
    return options[got]


def check_range(
    where: str,
    values: Mapping[str, Any],
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    whole: bool = False,
    who: str = '',
) -> None:
    """Raises UserError unless every value is a finite number within the bounds.

    Args:
        where: the config key that the values lie under, for errors: 'config.method'.
        values: name -> number.
        least, most: bounds that a value may be.
        above, below: bounds that it may not be.
        whole: integers alone.
        who: asks for it, for errors: the name of a method.
    """
    said = {'above': above, 'of at least': least, 'below': below, 'of at most': most}
    if math.isfinite(least) and math.isfinite(most):
        said = {f'from {least} to': most}
    bounds = [f'{word} {bound}' for word, bound in said.items() if math.isfinite(bound)]
    expected = ' '.join(['a whole number' if whole else 'a number', ' and '.join(bounds)]).strip()
    kind: Any = numbers.Integral if whole else numbers.Real
    for name, value in values.items():
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not (number and least <= value <= most and above < value < below):
            asks = f'{who} expects' if who else 'expected'
            raise UserError(f'{where}.{name}: got {value!r}; {asks} {expected}.')


def each(name: str, values: Iterable[Any]) -> dict[str, Any]:
    """The elements of a sequence as values for `check_range`.

    >>> each('k', (1, 5))
    {'k[0]': 1, 'k[1]': 5}
    """
    return {f'{name}[{i}]': value for i, value in enumerate(values)}


def call(function: Callable, where: str, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, with unknown or missing keywords reported as `where`'s keys."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    settable = [p.name for p in named[len(args) :]]
    for key in kwargs:
        if key not in settable and not open_ended:
            raise unknown('key', key, settable, where)
    for p in named[len(args) :]:
        if p.default is p.empty and p.name not in kwargs:
            raise UserError(f'{where}: key {p.name!r} is required and not set.')
    return function(*args, **kwargs)


def module(package: str, name: str, where: str) -> Any:
    """Imports `contrastive_jax.<package>.<name>`; an unknown name lists the modules there are."""
    parent = importlib.import_module(f'contrastive_jax.{package}')
    names = [m.name for m in pkgutil.iter_modules(parent.__path__)]
    if name not in names:
        raise unknown('name', name, names, where)
    return importlib.import_module(f'contrastive_jax.{package}.{name}')


def build(package: str, spec: Mapping[str, Any], where: str, *args: Any, **more: Any) -> Any:
    """Calls `make(*args, **spec without 'name', **more)` of the module that `spec['name']` names.

    Args:
        package: 'methods', 'models', 'evals' or 'data.sources'.
        spec: `name` and the keywords of that module's `make`.
        where: the config key that the spec came from, for errors: 'config.method'.
        *args: what `make` takes first.
        **more: keywords that the config does not set.

    Raises:
        UserError: unknown module name, unknown keyword or missing keyword.
    """
    kwargs = {k: v for k, v in spec.items() if k != 'name'}
    if 'name' not in spec:
        raise UserError(f"{where}: key 'name' is required and not set.")
    make = module(package, spec['name'], where).make
    return call(make, where, *args, **{**kwargs, **more})


def base() -> Config:
    """Every top-level key with its meaning; a recipe fills in what is its own."""
    return ConfigDict(
        {
            'seed': 0,
            # Length: total_steps optimiser steps, or if that is 0, total_epochs over the data.
            'total_steps': 0,
            'total_epochs': 0.0,
            # Records of one optimiser step, over all devices.
            'batch_size': 256,
            # Micro-batches of a step, each with negatives and BatchNorm statistics of its own; a
            # queue or a centre moves once a step.
            'accumulate': 1,
            # Records that are encoded at a time, 0: all; every negative still counts (GradCache).
            'microbatch': 0,
            # Keep no activations within the encoder's blocks: a third more time, less memory.
            'remat': False,
            # Split parameters, optimiser and target networks over the devices.
            'fsdp': False,
            # A run's workdir, or a file of weights, whose encoders to start from, as far as the
            # method has them. What config.model does not set is as in the file.
            'init_from': '',
            # Top-level modules of that run's parameters to start from in the place of its encoders:
            # ('encoder', 'projector').
            'init_modules': (),
            # Steps between log lines, evaluations (0: at the start and the end) and checkpoints.
            'log_every': 50,
            'eval_every': 0,
            'checkpoint_every': 1000,
            # How many of the newest checkpoints stay, beside the best one, and what is best.
            'keep': 2,
            'best': 'eval/knn/top1',
            # Also write TensorBoard events; needs the [tensorflow] extra.
            'tensorboard': False,
            'data': {
                # A file of data/sources, or tfds:<name>; root is its directory (TFDS' data_dir).
                'source': '',
                'root': '',
                # The file of captions, where there are several in root.
                'captions': '',
                # Share of the records held out for tests where the source has no test split.
                'holdout': 0.1,
                # A larger share of unusable records stops the run.
                'max_bad': 0.01,
            },
            # name -> a file of inputs/, models/, methods/, evals/; the rest are keywords of its
            # make(). text: the model that reads captions, of a method that has one.
            'inputs': {},
            'model': {},
            'text': {},
            'method': {},
            'evals': {},
            # Keywords of optim.make().
            'optim': {},
        }
    )


# Every option of inputs/images.py, so that a command line can set it.
_IMAGES: dict[str, Any] = {
    'name': 'images',
    'size': 224,
    'mean': (0.485, 0.456, 0.406),
    'std': (0.229, 0.224, 0.225),
    'views': 2,
    'view_size': 0,
    'crop': {'scale': (0.08, 1.0), 'interpolation': 'bicubic', 'flip': 0.5},
    'local_views': 0,
    'local_size': 96,
    'local_scale': (0.05, 0.4),
    'crop_fraction': 1.0,
    'augment': {},
}
# What a data set, not a recipe, determines: of config.data and of config.inputs.
_DATASETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The 8 × 8 scans enlarged, so that crops need not fall on pixels.
    'digits': ({'source': 'digits'}, {'size': 16, 'mean': (0.305,) * 3, 'std': (0.376,) * 3}),
    'cifar10': (
        {'source': 'tfds:cifar10'},
        {'size': 32, 'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616)},
    ),
    'imagenet': ({'source': 'tfds:imagenet2012'}, {'crop_fraction': 0.875}),
    'folder': ({'source': 'folder'}, {'crop_fraction': 0.875}),
    # OpenAI's mean and std of its images, which OpenCLIP keeps.
    'captions': (
        {'source': 'captions'},
        {
            'mean': (0.48145466, 0.4578275, 0.40821073),
            'std': (0.26862954, 0.26130258, 0.27577711),
        },
    ),
}


def images() -> Config:
    """Every option of inputs/images.py, as config.inputs has it without a recipe."""
    return ConfigDict(_IMAGES)


def dataset(config: Config, name: str) -> None:
    """Points a config at a known data set: its source, image size and pixel statistics."""
    data, inputs = choose('data set', name, _DATASETS)
    config.data.update(data)
    if not config.inputs:
        config.inputs = images()
    config.inputs.update(inputs)


# Which keys a config may change between two looks at one run. 'free': nothing that training
# depends on. 'data': an evaluation may look at other data than the run's own.
ROLES = {
    'free': ('log_every', 'checkpoint_every', 'keep', 'evals', 'eval_every', 'tensorboard'),
    'data': ('data.source', 'data.root', 'data.captions', 'data.holdout', 'data.max_bad'),
}
# Keys of earlier versions -> where they are now.
_MOVED = {
    'augment': 'inputs.augment',
    'data.image_size': 'inputs.size',
    **{f'data.{key}': f'inputs.{key}' for key in _IMAGES.keys() - {'name', 'size', 'augment'}},
    'data.text': 'inputs.text',
}


def updated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of any version, as nested dicts, in today's keys.

    Args:
        config: as a run's config.json or a file of weights has it.
    """
    found = copy.deepcopy(dict(config))
    # A share of the run; config.optim.modules says it now. Runs that had it can be looked at alone.
    found.get('method', {}).pop('frozen', None)
    if 'inputs' in found:
        return found
    found['inputs'] = inputs = json.loads(json.dumps(_IMAGES))
    for old, new in _MOVED.items():
        *path, key = old.split('.')
        at = found
        for name in path:
            at = at.get(name, {})
        if key in at:
            inputs[new.removeprefix('inputs.')] = at.pop(key)
    if not inputs.get('text'):
        inputs.pop('text', None)
    else:
        inputs['name'] = 'captions'
    return found


def renamed(metric: str) -> str:
    """Today's name of a metric that a run of any version has recorded."""
    if metric == 'train/images_per_second':
        return 'train/examples_per_second'
    path, _, name = metric.rpartition('/')
    if path.startswith('eval/') and name.startswith('pixels_'):
        return f'{path}/baseline_{name.removeprefix("pixels_")}'
    return metric


def defaults() -> dict[str, Any]:
    """Every key that no recipe needs to set, flat, with its value as JSON has it."""
    return flatten(json.loads(json.dumps(base().to_dict())))


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with every keyword that it leaves at the default of its method, model, optimiser.

    Args:
        config: nested; parts that name nothing or what does not exist stay as they are.
    """

    def filled(function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(given)

    found = dict(config)
    parts = {'inputs': 'inputs', 'model': 'models', 'text': 'models', 'method': 'methods'}
    for part, package in parts.items():
        given = found.get(part) or {}
        try:
            make = module(package, given.get('name', ''), '').make
        except UserError:
            continue
        found[part] = filled(make, given)
    if given := found.get('optim'):
        optim = importlib.import_module('contrastive_jax.optim')
        given = filled(optim.OPTIMISERS.get(given.get('name'), lambda: None), given)
        found['optim'] = filled(optim.make, given)
    return found


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def check_keys(config: Config) -> None:
    """Raises UserError for a key of the config or of config.data that nothing reads."""
    known = base()
    for where, ours, theirs in (
        ('config', config, known),
        ('config.data', config.data, known.data),
    ):
        for key in ours:
            if key not in theirs:
                full = f'{where}.{key}'.removeprefix('config.')
                if full in _MOVED:
                    raise UserError(f'config.{full}: is config.{_MOVED[full]} now.')
                raise unknown('key', key, theirs, where)


def preset(presets: Mapping[str, Callable[[Config], None]], arg: str | None) -> Config:
    """`base()` filled in by the preset that the argument after the config's ':' names.

    Args:
        presets: functions that fill a config in; the first one is the default.
        arg: the text after ':', None or '' for the default.
    """
    config = base()
    choose('preset', arg or next(iter(presets)), presets, 'config')(config)
    return config.lock()
