"""What the model is told of each token besides its id."""

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TokenInfo:
    """Carried to every block.

    Attributes:
      rows_B: int32 [batch], which row of the global batch each sequence is: dropout masks belong to rows.
      positions_BT: int32 [batch, time], the position of each token in its sequence, or None: 0, 1, ...
      documents_BT: int32 [batch, time], equal where two tokens of a row are of one document and may see each other, or
        None: each row is one document.
    """

    rows_B: jax.Array
    positions_BT: jax.Array | None = None
    documents_BT: jax.Array | None = None

    @classmethod
    def of(
        cls,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        rows_B: jax.Array | None = None,
        documents_BT: jax.Array | None = None,
    ) -> 'TokenInfo':
        """With the rows counted from 0 where they are not given."""
        rows_B = jnp.arange(tokens_BT.shape[0]) if rows_B is None else rows_B
        return cls(rows_B, positions_BT, documents_BT)
