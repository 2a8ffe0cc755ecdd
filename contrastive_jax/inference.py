"""From pictures and texts to features: an encoder as evaluators, programs and people see it."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from contrastive_jax import augment, data, evals, experiment, parallel, weights
from contrastive_jax import config as config_lib
from contrastive_jax.config import Config, UserError
from contrastive_jax.data import BadRecord, decode, text
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.experiment import Parts
from contrastive_jax.inputs import pipeline, views
from contrastive_jax.method import Encode, Tree
from contrastive_jax.state import TrainState
from contrastive_jax.weights import files
from contrastive_jax.workdir import checkpoint


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
        batch_size: pictures or texts that each device encodes at a time, at least 1. Fewer are
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
    config, step = experiment.config_of(path), checkpoint.newest(path)
    method = experiment.build_method(_plain(config), {})
    state = checkpoint.weights(path, step)
    tokenizer = functools.partial(_tokenizer_of, path, config)
    return Trained(path, config, method.encode, state, step, tokenizer, batch_size)


class Trained:
    """A trained encoder on the devices of this process: see `load`.

    Attributes:
        config: the run's, or of a file what is known of it.
        workdir: of the run; or the file.
        step: of the checkpoint; 0 of a file.
        outputs: what there is of a picture, 'features' and maybe others, with its dimensions.
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
        if batch_size < 1:
            raise UserError(f'batch_size: got {batch_size}, expected at least 1.')
        self.workdir, self.config, self.step = os.fspath(workdir), config, step
        self._tokenizer, d = tokenizer, config.data
        self._mesh = parallel.make_mesh(jax.local_devices())
        self._rows = batch_size * self._mesh.size
        self._weights = jax.device_put(state, parallel.replicated(self._mesh))
        self._forward = _forward(encode, tuple(d.mean), tuple(d.std), parallel.rows(self._mesh))
        image = jax.ShapeDtypeStruct((1, d.image_size, d.image_size, 3), jnp.float32)
        shapes = jax.eval_shape(encode, *state, {'image': image})
        self.outputs = {name: x.shape[1] for name, x in shapes.items() if x.ndim == 2}

    def __call__(
        self, images: np.ndarray | Sequence[np.ndarray | str | os.PathLike], name: str = 'features'
    ) -> np.ndarray:
        """Rows [N, D] float32 of pictures, not normalised.

        Args:
            images: [N, H, W, 3] uint8; or uint8 arrays [H, W, 3] of any sizes and paths of JPEG,
                PNG and WebP files. They are resized and centre-cropped as for evaluation.
            name: one of `outputs`.

        Raises:
            UserError: a picture that cannot be used, by its name; no such output.
        """
        if isinstance(images, (str, os.PathLike)):
            raise UserError(f'images: got one path, {str(images)!r}; expected a list of them.')
        source = _Given(images)
        batches = self.pictures(source, BadRecords(None, len(source)), name)
        return self._joined(batches, len(source), name)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [N, E] float32 of texts, not normalised.

        Raises:
            UserError: the method reads no texts.
        """
        if isinstance(texts, str):
            raise UserError(f'texts: got one text, {texts!r}; expected a list of them.')
        return self._joined(self.sentences(texts), len(texts), 'embedding')

    def pictures(
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
        d = self.config.data
        batches = pipeline.eval_batches(
            source,
            batch_size=self._rows * process_count,
            image_size=d.image_size,
            bad=bad,
            crop_fraction=d.crop_fraction,
            interpolation=d.crop.interpolation,
            process_index=process_index,
            process_count=process_count,
        )
        return self._run(batches, 'image', name)

    def sentences(
        self, texts: Sequence[str], *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `pictures`: the embeddings of texts."""
        batches = pipeline.text_batches(
            self.tokenizer,
            texts,
            batch_size=self._rows * process_count,
            process_index=process_index,
            process_count=process_count,
        )
        return self._run(batches, 'text', 'embedding')

    def check(self, name: str) -> None:
        """Raises UserError unless there is such an output."""
        config_lib.choose('output', name, self.outputs, self._what)

    @functools.cached_property
    def tokenizer(self) -> text.Tokenizer:
        """The run's or the file's; a UserError where the encoder reads no texts."""
        if not self.config.text:
            raise UserError(
                f'{self.workdir}: {self._what} reads no texts; it gives '
                f'{", ".join(self.outputs)} of pictures.'
            )
        return self._tokenizer()

    @property
    def _what(self) -> str:
        method = self.config.method.get('name')
        return f'the method {method!r}' if method else 'the encoder'

    def identity(self) -> dict[str, Any]:
        """What is the same for two encoders that are one, at any step: the run's config as it was
        written, or a digest of the file."""
        if weights.is_file(self.workdir):
            return {'file': files.digest(self.workdir)}
        return checkpoint.read(self.workdir)

    def _run(
        self, batches: Iterator[dict[str, np.ndarray]], kind: str, name: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        waiting: list[tuple[jax.Array, np.ndarray]] = []

        def done() -> tuple[np.ndarray, np.ndarray]:
            x_bD, used_b = waiting.pop(0)
            return np.where(used_b[:, None], np.asarray(x_bD, np.float32), 0), used_b

        for batch in batches:
            inputs = parallel.shard_batch(self._mesh, {kind: batch[kind]})
            waiting.append((self._forward(*self._weights, inputs, name), batch['mask'] > 0))
            if len(waiting) > 2:  # the devices always have the next batches to work on
                yield done()
        while waiting:
            yield done()

    def _joined(
        self, batches: Iterator[tuple[np.ndarray, np.ndarray]], count: int, name: str
    ) -> np.ndarray:
        parts = [x_bD for x_bD, _ in batches]
        return np.concatenate(parts)[:count] if parts else np.zeros((0, self.outputs[name]), 'f4')


def weights_of(path: str | os.PathLike) -> weights.Weights:
    """The encoder of a run's newest checkpoint, or of a file, by itself.

    Raises:
        UserError: see `load`.
    """
    if weights.is_file(path):
        return weights.read(path)
    config = experiment.config_of(path)
    state = checkpoint.weights(path, checkpoint.newest(path))
    plain = _plain(config)
    found = experiment.build_method(plain, {}).encoders(*state)
    vocabulary = next(iter(text.files(path)), None) if 'text' in found else None
    tokenizer = (vocabulary.name, vocabulary.read_bytes()) if vocabulary else None
    return weights.Weights(plain, found, os.fspath(path), tokenizer)


def _plain(config: Config) -> Config:
    """Without two notions of training that would tie the model to the run's batch."""
    config = config.copy_and_resolve_references()
    config.update({'microbatch': 0, 'remat': False})
    return config


def _tokenizer_of(workdir: str | os.PathLike, config: Config) -> text.Tokenizer:
    d = config.data.text
    return text.open_tokenizer(workdir, length=d.length, lower=d.lower)


class _Given:
    """Pictures that a caller gives, as a source; one that cannot be used is a UserError."""

    def __init__(self, images: Any):
        self.images, self.classes = images if hasattr(images, 'ndim') else list(images), []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> data.Record:
        image = self.images[index]
        if isinstance(image, (str, os.PathLike)):
            try:
                image = decode.decode(epath.Path(image).read_bytes())
            except (BadRecord, OSError) as error:
                reason = getattr(error, 'strerror', None) or error
                raise UserError(f'{os.fspath(image)}: {reason}') from error
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            got = f'{image.dtype} {list(image.shape)}'
            raise UserError(f'{self.describe(index)}: got {got}, expected uint8 [H, W, 3].')
        return {'image': image, 'label': -1}

    def describe(self, index: int) -> str:
        return f'images[{index}]'


def open_run(workdir: str) -> tuple[Parts, evals.Encoder]:
    """What a run has trained, to look at: its data and the newest checkpoint's encoder.

    `encoder.features('test')` are the features and labels of a split.

    Raises:
        UserError: there is no run in workdir, or no complete checkpoint of it.
    """
    config = experiment.config_of(workdir)
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        parts = experiment.build_parts(config, workdir, mesh)
        checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.best)
        state = checkpoints.restore(parts.program.state)
        checkpoints.close()
    if state is None:
        raise UserError(f'there is no complete checkpoint in {workdir}/checkpoints.')
    return parts, encoder(config, parts, mesh, state)


def encoder(
    config: Config,
    parts: Parts,
    mesh: jax.sharding.Mesh,
    state: TrainState | None,
    how: Encode | None = None,
) -> evals.Encoder:
    """A state's encoder (by `how`, or the method's own), or without a state the raw pixels."""
    d = config.data
    moments = tuple(d.mean), tuple(d.std)
    tower = outputs = None
    if state is None:
        encode = functools.partial(_pixels, *moments)
    else:
        method = parts.program.method
        module = config_lib.build('models', config.model, 'config.model')
        tower = evals.Tower(module, *method.encoders(state.params, state.extra)['image'])
        how = how or method.encode
        forward = _forward(how, *moments, parallel.rows(mesh))
        encode = functools.partial(forward, state.params, state.extra)
        image = jax.ShapeDtypeStruct((1, d.image_size, d.image_size, 3), jnp.float32)
        trace = functools.partial(jax.eval_shape, how, state.params, state.extra, {'image': image})
        outputs = lambda: list(trace())  # noqa: E731

    def pictures(source: data.Source, size: int, **share: int) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.eval_batches(
            source,
            batch_size=size,
            image_size=d.image_size,
            bad=parts.bad,
            crop_fraction=d.crop_fraction,
            interpolation=d.crop.interpolation,
            **share,
        )

    def batches(name: str) -> Iterator[dict[str, np.ndarray]]:
        share = {'process_index': jax.process_index(), 'process_count': jax.process_count()}
        return pictures(parts.splits[name], config.batch_size, **share)

    def images(name: str, rows: evals.Rows) -> np.ndarray:
        some = data.Subset(parts.splits[name], list(map(int, rows)))
        return next(pictures(some, len(rows)))['image']

    def pairs(name: str, rows: evals.Rows) -> np.ndarray:
        return views.pairs(config, parts.splits[name], rows, config.seed)

    def texts(texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        assert parts.tokenizer is not None
        return pipeline.text_batches(
            parts.tokenizer,
            texts,
            batch_size=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def captions(name: str) -> list[list[str]] | None:
        source: Any = parts.splits[name]
        if not hasattr(source, 'captions'):
            return None
        return [data.captions(source, i) for i in range(len(source))]

    return evals.Encoder(
        encode,
        tuple(parts.splits),
        parts.splits['train'].classes,
        batches,
        mesh,
        texts=texts if parts.tokenizer and state is not None else None,
        captions=captions,
        images=images,
        sizes={name: len(source) for name, source in parts.splits.items()},
        tower=tower,
        views=evals.Views(*moments, d.crop.to_dict(), pairs),
        outputs=outputs,
        random=state is not None and int(state.step) == 0 and not config.init_from,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _pixels(mean: tuple, std: tuple, batch: dict[str, jax.Array], name: str) -> jax.Array:
    """The raw-pixel baseline: normalised as for the encoder, at most 16 × 16 of them.

    Cosines of pixels that are all positive say little, and all pixels of a photograph would not
    fit. What the smaller size costs the baseline has not been measured.
    """
    del name
    images = augment.normalize(batch['image'], mean, std)
    side = min(images.shape[1], 16)
    images = jax.image.resize(images, (images.shape[0], side, side, 3), 'linear')
    return images.reshape(images.shape[0], -1)


@functools.lru_cache(maxsize=2)
def _forward(encode: Encode, mean: tuple, std: tuple, split: Any) -> Callable:
    """`(params, extra, batch, name) -> output`, compiled once for all evaluations.

    The batch has uint8 images or the ids of texts; `name` is of what the method's `encode` gives.
    """

    def forward(params: Any, extra: Any, batch: dict[str, jax.Array], name: str) -> jax.Array:
        if 'image' in batch:
            inputs = {'image': augment.normalize(batch['image'], mean, std)}
        else:
            inputs = {'text': batch['text']}
        return encode(params, extra, inputs)[name]

    # State and batch lie as they are.
    return jax.jit(forward, static_argnums=3, out_shardings=split)
