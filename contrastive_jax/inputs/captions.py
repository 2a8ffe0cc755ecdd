"""Images with captions, one of which is drawn for each training row.

Dimension key: B batch, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax import config, data
from contrastive_jax.config import UserError
from contrastive_jax.data import Record, Source
from contrastive_jax.data import text as texts
from contrastive_jax.inputs import Inputs, Row, images


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
    shape = jax.ShapeDtypeStruct((length,), jnp.int32)
    shapes = {**of_images.train.shapes, 'text': shape}

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

        def host(record: Record, rng: np.random.Generator) -> Row:
            row = of_images.train.host(record, rng)
            # Drawn after the crops, which stay the same with and without captions.
            captions = record.get('captions', [])
            return {**row, 'text': found([captions[rng.integers(len(captions))]])[0]}

        train = of_images.train._replace(host=host, shapes=shapes)
        return described._replace(train=train, tokenizer=found, prepare=None)

    described = of_images._replace(
        train=of_images.train._replace(shapes=shapes),
        reads=(*of_images.reads, 'captions'),
        prepare=prepare,
    )
    return described
