"""From data to features: a trained encoder for programs and people, and for evaluators."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from contrastive_jax import config as config_lib
from contrastive_jax import data, parallel, weights
from contrastive_jax import experiment as experiments
from contrastive_jax import inputs as inputs_lib
from contrastive_jax.config import Config, UserError, check_range
from contrastive_jax.data import BadRecord, text
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.evaluation import Asked
from contrastive_jax.evaluation.subject import Subject, Weights
from contrastive_jax.experiment import Experiment
from contrastive_jax.inputs import Inputs, pipeline
from contrastive_jax.method import Encode, Tree
from contrastive_jax.state import TrainState
from contrastive_jax.weights import files
from contrastive_jax.workdir import checkpoint, runs


def load(
    path: str | os.PathLike,
    *,
    batch_size: int = 64,
    image_size: int | None = None,
    model: Mapping[str, Any] | None = None,
) -> 'Trained':
    """The encoder of a run's newest checkpoint, finished or not, or of a file of weights.

        encoder = contrastive_jax.load('runs/clip')  # or 'vit.safetensors'
        encoder(['a.jpg', 'b.png'])               # features [2, D]
        encoder(uint8_images_NHW3, 'embedding')   # [N, E], in the space shared with texts
        encoder.texts(['a dog on the beach'])     # [1, E]

    Args:
        path: the run's workdir, a path or a bucket's URL, whose data is not needed; or a file of
            weights, see `weights.read`: our own, or of timm, transformers, OpenCLIP, DINOv2, ...
        batch_size: records or texts that each device encodes at a time, at least 1. Fewer are
            padded to as many, so that each kind is compiled once. Rows have the same bits on any
            number of devices.
        image_size, model: of a file alone, see `weights.read`.

    Raises:
        UserError: no run in path, no complete checkpoint of it, batch_size below 1; what
            `weights.read` raises.
    """
    if weights.is_file(path):
        found = weights.read(path, image_size=image_size, model=model)
        encode, state = weights.encoder(found)
        tokenizer = functools.partial(weights.tokenizer, found)
        return Trained(path, found.config, encode, state, 0, tokenizer, batch_size)
    if image_size or model:
        raise UserError(f'{os.fspath(path)}: image_size and model are for files of weights.')
    config, step = runs.config_of(path), checkpoint.newest(path)
    method = experiments.build_method(_plain(config), {})
    state = checkpoint.weights(path, step)
    tokenizer = functools.partial(_tokenizer_of, path, config)
    return Trained(path, config, method.encode, state, step, tokenizer, batch_size)


class Trained:
    """A trained encoder on the devices of this process: see `load`.

    Attributes:
        config: the run's, or of a file what is known of it.
        inputs: how it sees data.
        workdir: of the run; or the file.
        step: of the checkpoint; 0 of a file.
        outputs: what there is of a record, 'features' and maybe others, with its dimensions.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Config,
        encode: Encode,
        state: tuple[Tree, Tree],
        step: int,
        tokenizer: Callable[[], text.Tokenizer],
        batch_size: int,
    ):
        check_range('load', {'batch_size': batch_size}, least=1, whole=True)
        self.workdir, self.config, self.step = os.fspath(workdir), config, step
        self.inputs = experiments.build_inputs(config)
        self._tokenizer = tokenizer
        self._mesh = parallel.make_mesh(jax.local_devices())
        self._rows = batch_size * self._mesh.size
        self._weights = jax.device_put(state, parallel.replicated(self._mesh))
        self._forward = _forward(encode, self.inputs.eval.device, parallel.rows(self._mesh))
        shapes = jax.eval_shape(encode, *state, inputs_lib.blank(self.inputs.eval))
        self.outputs = {name: x.shape[1] for name, x in shapes.items() if x.ndim == 2}

    def __call__(self, items: np.ndarray | Sequence[Any], name: str = 'features') -> np.ndarray:
        """Rows [N, D] float32 of records, not normalised.

        Args:
            items: of a run on images: [N, H, W, 3] uint8; or uint8 arrays [H, W, 3] of any sizes
                and paths of JPEG, PNG and WebP files. They are resized and centre-cropped as for
                evaluation. Of a run on other data, what its inputs take: see their `record`.
            name: one of `outputs`.

        Raises:
            UserError: a record that cannot be used, by its name; no such output.
        """
        if isinstance(items, (str, os.PathLike)):
            raise UserError(f'got one path, {str(items)!r}; expected a list of them.')
        source = _Given(items, self.inputs)
        batches = self.records(source, BadRecords(None, len(source)), name)
        return self._joined(batches, len(source), name)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [N, E] float32 of texts, not normalised.

        Raises:
            UserError: the method reads no texts.
        """
        if isinstance(texts, str):
            raise UserError(f'texts: got one text, {texts!r}; expected a list of them.')
        return self._joined(self.sentences(texts), len(texts), 'embedding')

    def records(
        self,
        source: data.Source,
        bad: BadRecords,
        name: str,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A source's rows batch by batch, in order; for `process_count`, see `eval_batches`.

        Yields:
            x_bD float32, and bool [b]: False for padding and bad records, whose rows are zeros.

        Raises:
            UserError: no such output; too many bad records.
        """
        self.check(name)
        batches = pipeline.eval_batches(
            source,
            self.inputs.eval,
            batch_size=self._rows * process_count,
            bad=bad,
            process_index=process_index,
            process_count=process_count,
        )
        return self._run(batches, tuple(self.inputs.eval.shapes), name)

    def sentences(
        self, texts: Sequence[str], *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `records`: the embeddings of texts."""
        batches = pipeline.text_batches(
            self.tokenizer,
            texts,
            batch_size=self._rows * process_count,
            process_index=process_index,
            process_count=process_count,
        )
        return self._run(batches, ('text',), 'embedding')

    def check(self, name: str) -> None:
        """Raises UserError unless there is such an output."""
        config_lib.choose('output', name, self.outputs, self._what)

    @functools.cached_property
    def tokenizer(self) -> text.Tokenizer:
        """The run's or the file's; a UserError where the encoder reads no texts."""
        if not self.config.text:
            raise UserError(
                f'{self.workdir}: {self._what} reads no texts; it gives '
                f'{", ".join(self.outputs)} of {", ".join(self.inputs.eval.shapes)}.'
            )
        return self._tokenizer()

    @property
    def _what(self) -> str:
        method = self.config.method.get('name')
        return f'the method {method!r}' if method else 'the encoder'

    def identity(self) -> dict[str, Any]:
        """Equal for two encoders that are one, at any step: the run's config as it was written, or
        a digest of the file."""
        if weights.is_file(self.workdir):
            return {'file': files.digest(self.workdir)}
        return checkpoint.written(self.workdir)

    def _run(
        self, batches: Iterator[dict[str, np.ndarray]], keys: Sequence[str], name: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        def run() -> Iterator[tuple[jax.Array, np.ndarray]]:
            for batch in batches:
                given = parallel.shard_batch(self._mesh, {key: batch[key] for key in keys})
                yield self._forward(*self._weights, given, name), batch['mask'] > 0

        for x_bD, used_b in parallel.in_flight(run()):
            yield np.where(used_b[:, None], np.asarray(x_bD, np.float32), 0), used_b

    def _joined(
        self, batches: Iterator[tuple[np.ndarray, np.ndarray]], count: int, name: str
    ) -> np.ndarray:
        parts = [x_bD for x_bD, _ in batches]
        return np.concatenate(parts)[:count] if parts else np.zeros((0, self.outputs[name]), 'f4')


def weights_of(path: str | os.PathLike) -> weights.Weights:
    """The encoder of a run's newest checkpoint, or of a file, by itself.

    Raises:
        UserError: see `load`; a run on other data than images, or that sees them in a way which a
            file of weights does not say.
    """
    if weights.is_file(path):
        return weights.read(path)
    config = runs.config_of(path)
    shapes = experiments.build_inputs(config).eval.shapes
    if 'image' not in shapes:
        raise UserError(
            f'{os.fspath(path)}: an encoder of {", ".join(shapes)}; only those of images have a '
            'file of weights by itself.'
        )
    for key, cannot in (('standardise', True), ('colour', 'project')):
        if config.inputs.get(key) == cannot:
            raise UserError(
                f'{os.fspath(path)}: was trained with config.inputs.{key}={cannot!r}, which no '
                'file of weights says; `contrastive_jax.load` and `embed` do it.'
            )
    state = checkpoint.weights(path, checkpoint.newest(path))
    plain = _plain(config)
    found = experiments.build_method(plain, {}).encoders(*state)
    vocabulary = next(iter(text.files(path)), None) if 'text' in found else None
    tokenizer = (vocabulary.name, vocabulary.read_bytes()) if vocabulary else None
    return weights.Weights(plain, found, os.fspath(path), tokenizer)


def _plain(config: Config) -> Config:
    """Without two notions of training that would tie the model to the run's batch."""
    config = config.copy_and_resolve_references()
    config.update({'microbatch': 0, 'remat': False})
    return config


def _tokenizer_of(workdir: str | os.PathLike, config: Config) -> text.Tokenizer:
    d = config.inputs.text
    return text.open_tokenizer(workdir, length=d.length, lower=d.lower)


class _Given:
    """Items that a caller gives, as a source; one that cannot be used is a UserError."""

    def __init__(self, items: Any, inputs: Inputs):
        self.items, self.inputs = items if hasattr(items, 'ndim') else list(items), inputs
        self.classes: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> data.Record:
        try:
            return self.inputs.record(self.items[index])
        except BadRecord as error:
            raise UserError(f'{self.describe(index)}: {error}') from error

    def describe(self, index: int) -> str:
        item = self.items[index]
        return os.fspath(item) if isinstance(item, (str, os.PathLike)) else f'items[{index}]'


def open_run(workdir: str) -> tuple[Experiment, Subject]:
    """A run to look at: what its config names, and the newest checkpoint's encoder.

    `subject.features('test')` are the features and labels of a split.

    Raises:
        UserError: there is no run in workdir, or no complete checkpoint of it.
    """
    config = runs.config_of(workdir)
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        experiment = experiments.open(config, workdir, mesh)
        checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.best)
        state = checkpoints.restore(experiment.state)
        checkpoints.close()
    if state is None:
        raise UserError(f'there is no complete checkpoint in {workdir}/checkpoints.')
    return experiment, subject(experiment, state)


def subject(experiment: Experiment, state: TrainState, encode: Encode | None = None) -> Subject:
    """A state's encoder, for evaluators.

    Args:
        experiment: whose state it is.
        state: the weights.
        encode: in the place of the method's own.
    """
    e = experiment
    encode = encode or e.method.encode
    forward = _forward(encode, e.inputs.eval.device, parallel.rows(e.mesh))
    blank = jax.eval_shape(lambda: inputs_lib.blank(e.inputs.eval))
    module = config_lib.build('models', e.config.model, 'config.model')
    encoder = next(iter(e.method.encoders(state.params, state.extra).values()))
    return Subject(
        functools.partial(forward, state.params, state.extra),
        e.inputs,
        e.splits,
        e.mesh,
        batch_size=e.config.batch_size,
        bad=e.bad,
        outputs=lambda: list(jax.eval_shape(encode, state.params, state.extra, blank)),
        weights=Weights(module, *encoder),
        random=int(state.step) == 0 and not e.config.init_from,
        task=_asked(e, state) if e.method.task else None,
    )


def _asked(e: Experiment, state: TrainState) -> Asked:
    """The task of an experiment's method, of a state."""
    assert e.method.task is not None
    device = (e.inputs.task or e.inputs.eval).device
    score = _score(e.method.task.score, device, parallel.rows(e.mesh))
    return Asked(functools.partial(score, state.params, state.extra), e.method.task.units)


def baseline(
    inputs: Inputs,
    splits: Mapping[str, data.Source],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    bad: BadRecords,
) -> Subject:
    """Features that need no network, for evaluators: raw pixels, log power."""
    encode = _baseline(inputs.baseline, inputs.eval.device)
    return Subject(encode, inputs, splits, mesh, batch_size=batch_size, bad=bad)


@functools.lru_cache(maxsize=2)
def _baseline(features: Callable, device: Callable) -> Callable:
    @functools.partial(jax.jit, static_argnames=('name', 'prepared'))
    def forward(batch: inputs_lib.Batch, name: str, prepared: bool = False) -> jax.Array:
        if name != 'features':
            raise KeyError(name)
        return features(batch if prepared else device(None, batch))

    return forward


@functools.lru_cache(maxsize=2)
def _forward(encode: Encode, device: Callable, split: Any) -> Callable:
    """`(params, extra, batch, name, prepared=False) -> output`, compiled once for all evaluations.

    The batch is one that `device` takes (or, prepared, gives) or has the ids of texts; `name` is of
    what the method's `encode` gives.
    """

    def forward(
        params: Any, extra: Any, batch: inputs_lib.Batch, name: str, prepared: bool = False
    ) -> jax.Array:
        given = batch if prepared or 'text' in batch else device(None, batch)
        return encode(params, extra, given)[name]

    # State and batch lie as they are.
    return jax.jit(forward, static_argnames=('name', 'prepared'), out_shardings=split)


@functools.lru_cache(maxsize=2)
def _score(score: Callable, device: Callable, split: Any) -> Callable:
    """`(params, extra, batch) -> {name: [B]}`: `method.Task.score`, compiled as `_forward` is."""

    def found(params: Any, extra: Any, batch: inputs_lib.Batch) -> dict[str, jax.Array]:
        return score(params, extra, device(None, batch), jax.random.key(0))

    return jax.jit(found, out_shardings=split)
