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
    """

    rows_B: jax.Array
    positions_BT: jax.Array | None = None

    @classmethod
    def of(cls, tokens_BT: jax.Array, positions_BT: jax.Array | None, rows_B: jax.Array | None) -> 'TokenInfo':
        """With the rows counted from 0 where they are not given."""
        return cls(jnp.arange(tokens_BT.shape[0]) if rows_B is None else rows_B, positions_BT)
