"""Images with captions, one of which is drawn for each training row.

Dimension key: B batch, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax import config, data
from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord, Record, Source
from contrastive_jax.data import text as texts
from contrastive_jax.inputs import Inputs, Row, Transform, images


def make(*, text: Mapping[str, Any], **image: Any) -> Inputs:
    """Records with 'image' and 'captions', at least one.

    A training batch has beside that of `images` 'text' [B, T] int32; evaluation sees the images
    alone, and texts through `tokenizer`.

    Args:
        text: 'tokenizer', the file of a vocabulary ('': one is trained on the captions);
            'vocabulary', the number of ids that the text encoder knows; 'length', T, start and end
            counted; 'lower', whether to lower-case first.
        **image: as `images.make`.

    Raises:
        UserError: an option that is unknown, missing or out of range.
    """
    of_images = config.call(images.make, 'config.inputs', **image)
    return config.call(_with_text, 'config.inputs.text', of_images, **text)


def _with_text(
    of_images: Inputs, *, tokenizer: str, vocabulary: int, length: int, lower: bool
) -> Inputs:
    def prepare(source: Source | None, folders: Sequence[str]) -> Inputs:
        options = {'length': length, 'lower': lower}
        kept = next((folder for folder in folders if any(texts.files(folder))), None)
        if path := kept or tokenizer:
            found = texts.open_tokenizer(path, **options)
        elif source is None:
            raise UserError(f'there is no vocabulary in {", ".join(folders)}.')
        else:
            captions = (c for i in range(len(source)) for c in data.captions(source, i))
            found = texts.train_tokenizer(captions, vocabulary=vocabulary, **options)
        if found.vocabulary > vocabulary:
            raise UserError(
                f'config.inputs.text.vocabulary: got {vocabulary}, but {tokenizer} has '
                f'{found.vocabulary} tokens.'
            )
        train = with_text(of_images.train, found, length)
        return described._replace(train=train, tokenizer=found, prepare=None)

    # Not prepared, it is good for its shapes.
    described = of_images._replace(
        train=with_text(of_images.train, None, length),
        reads=(*of_images.reads, 'captions'),
        prepare=prepare,
    )
    return described


def with_text(
    transform: Transform, tokenize: Callable[[Sequence[str]], np.ndarray] | None, length: int
) -> Transform:
    """A transform of images that also draws one of a record's captions.

    Args:
        transform: of the images.
        tokenize: n texts to [n, T] int32; None: only shapes are asked for.
        length: T.
    """

    def host(record: Record, rng: np.random.Generator) -> Row:
        row = transform.host(record, rng)
        # Drawn after the crops, which stay the same with and without captions.
        captions = record.get('captions', [])
        if not captions:
            raise BadRecord('no caption')
        return {**row, 'text': captions[rng.integers(len(captions))]}

    shape = jax.ShapeDtypeStruct((length,), jnp.int32)
    return transform._replace(
        host=host,
        shapes={**transform.shapes, 'text': shape},
        collate={'text': tokenize} if tokenize else {},
    )
