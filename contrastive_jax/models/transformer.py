"""Text transformer: the second tower of CLIP and SigLIP.

Dimension key: B batch, T tokens, D width, N vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from contrastive_jax.config import UserError, check_range, choose
from contrastive_jax.layers.blocks import ACTIVATIONS, Block
from contrastive_jax.models.vit import DTYPES

POOLS = ('last', 'first', 'mean')


class Transformer(nn.Module):
    """See `make`."""

    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int
    hidden: int
    causal: bool
    pool: str
    remat: bool
    dtype: jnp.dtype
    activation: str = 'gelu_tanh'
    epsilon: float = 1e-6
    padding: int | None = None
    drop_tokens: float = 0.0

    @nn.compact
    def __call__(self, ids_BT: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch, length = ids_BT.shape
        if length > self.length:
            raise UserError(
                f'config.text: got texts of {length} tokens; expected at most {self.length}.'
            )
        if self.padding is not None:
            missing = ((0, 0), (0, self.length - length))
            ids_BT = jnp.pad(ids_BT, missing, constant_values=-1)
            ids_BT, length = jnp.where(ids_BT < 0, self.padding, ids_BT), self.length
        normal = nn.initializers.normal
        # CLIP's: 0.02 and 0.01
        table = self.param('token_embedding', normal(0.02), (self.vocabulary, self.width))
        positions = self.param('position_embedding', normal(0.01), (1, self.length, self.width))
        there_BT = ids_BT >= 0
        count_B1 = jnp.maximum(there_BT.sum(axis=1, keepdims=True), 1)
        last_BT = jnp.arange(length)[None, :] == count_B1 - 1
        x = table[jnp.maximum(ids_BT, 0)] + positions[:, :length]
        if train and self.drop_tokens and self.has_rng('drop'):
            # Both ends stay: one of them may be pooled.
            kept_BT = jax.random.bernoulli(
                self.make_rng('drop'), 1.0 - self.drop_tokens, ids_BT.shape
            )
            there_BT &= kept_BT.at[:, 0].set(True) | last_BT
        seen = there_BT[:, None, :]
        if self.causal:
            seen = seen & jnp.tril(jnp.ones((1, length, length), bool))
        else:
            seen = jnp.broadcast_to(seen, (batch, length, length))

        x = rearrange(x.astype(self.dtype), 'B T D -> (B T) D')
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        for i in range(self.depth):
            layer = block(
                self.heads,
                self.hidden,
                self.dtype,
                activation=self.activation,
                epsilon=self.epsilon,
                name=f'block{i}',
            )
            x, _ = layer(x, batch, train, seen)
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, name='norm')(x)
        x = rearrange(x, '(B T) D -> B T D', B=batch)

        if self.pool == 'first':
            return x[:, 0], {'tokens': x}
        # The share of each token: one for the last, or the same for all that are seen.
        if self.pool == 'last':
            share_BT = last_BT.astype(x.dtype)
        else:
            seen_B1 = jnp.maximum(there_BT.sum(axis=1, keepdims=True), 1)
            share_BT = there_BT / seen_B1.astype(x.dtype)
        return jnp.einsum('BTD,BT->BD', x, share_BT), {'tokens': x}


def make(
    *,
    vocabulary: int,
    length: int,
    width: int = 512,
    depth: int = 12,
    heads: int = 8,
    causal: bool = True,
    pool: str = 'last',
    mlp_ratio: float = 4.0,
    activation: str = 'gelu_tanh',
    epsilon: float = 1e-6,
    padding: int | None = None,
    drop_tokens: float = 0.0,
    remat: bool = False,
    dtype: str = 'float32',
) -> Transformer:
    """A pre-norm transformer over token ids, with learned positions.

    Called as `module(ids_BT, train)`: int32 ids, −1 for padding behind the text, which no token
    sees. It returns features [B, D] after the final LayerNorm and `{'tokens': [B, T, D]}`, float32.

    Args:
        vocabulary: ids are below this number.
        length: tokens of the longest text, start and end tokens included.
        width, depth, heads: CLIP's are 512, 12 and 8 for ViT-B (its table 19).
        causal: a token sees those before it alone, as in CLIP; SigLIP's see all.
        pool: what features are: the 'last' token (CLIP's end of text; SigLIP's last), the 'first'
            or the 'mean'.
        mlp_ratio: hidden width of the MLP over width, above 0.
        activation, epsilon: see `vit.make`.
        padding: an id that fills texts up to `length` and is a token as others are, seen and, if
            'last', pooled (SigLIP's published models); None: nothing sees what is behind a text.
        drop_tokens: share of the tokens, in [0, 1), that a training step hides from all others and
            from the mean, drawn anew each time (word dropout, Iyyer et al. 2015, "Deep unordered
            composition rivals syntactic methods"); the first and the last token stay.
        remat, dtype: see `vit.make`.

    Raises:
        UserError: a value outside those; a causal tower whose features are its first token, which
            has seen nothing else; (when called) longer texts.

    Source: CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.4); SigLIP (Zhai et al. 2023,
    arXiv:2303.15343). CLIP: kernels drawn from normal distributions that shrink with width and
    depth; here: as in our ViT, Xavier-uniform.
    """
    where = 'config.text'
    sizes = {'vocabulary': vocabulary, 'length': length}
    sizes |= {'width': width, 'depth': depth, 'heads': heads}
    check_range(where, sizes, least=1, whole=True)
    check_range(where, {'mlp_ratio': mlp_ratio, 'epsilon': epsilon}, above=0)
    check_range(where, {'drop_tokens': drop_tokens}, least=0, below=1)
    if padding is not None:
        check_range(where, {'padding': padding}, least=0, below=vocabulary, whole=True)
    if width % heads:
        raise UserError(f'{where}: got width={width}, heads={heads}; heads must divide width.')
    choose('pool', pool, dict.fromkeys(POOLS), where)
    choose('activation', activation, ACTIVATIONS, where)
    if causal and pool == 'first':
        raise UserError(
            f"{where}: got pool='first' and causal=True: the first token sees no other."
        )
    return Transformer(
        vocabulary=vocabulary,
        length=length,
        width=width,
        depth=depth,
        heads=heads,
        hidden=round(width * mlp_ratio),
        causal=causal,
        pool=pool,
        remat=remat,
        dtype=choose('dtype', dtype, DTYPES, where),
        activation=activation,
        epsilon=epsilon,
        padding=padding,
        drop_tokens=drop_tokens,
    )
