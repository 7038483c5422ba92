"""How much memory a training step takes on each device: what the state holds, exactly, and activations by a formula.

The state is known to the byte: every array of parameters and optimizer (the parameters' average is counted with it), in
the type that it is stored in and split as the sharding rules say; and float32 gradients, split like the parameters
(twice with micro-batches: the sum and the newest).

Activations follow Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4,
for the arrays that this model keeps. Of each token and layer, in multiples of d_model numbers of the compute dtype
(m: mlp_expansion, or n_inner / d_model):

    kept for the backward pass              none   dots   names   full   divided by mesh.tensor
    layer input                                1      1       1      1   no
    outputs of the two LayerNorms              2                         no
    query, key, value                          3      3       3          yes
    attention output, by heads                 1              1          yes
    attention output, heads joined             1                         yes
    attention projection                              1                  no
    residual stream after attention            1                         no
    MLP up projection                          m      m       m          yes
    inside GELU: 4 arrays, unrolled 2         4m                         yes
    GELU output                                m                         yes
    in all, m = 4 (unrolled)             33 (25)      9       9      1

The paper counts 34 bytes, 17 numbers of 16 bits, for m = 4: ours holds q, k, v and attention's output once more in
another layout, and what JAX's derivative of tanh-GELU asks for; of others see `KEPT_OF_ACTIVATION`. A scan stores all
of it in stacks. Where layers are unrolled the compiler fuses half of GELU's inside into its neighbours. Beside the
multiples of d_model:

    log-sum-exp of attention, none and names   4 bytes x n_head
    LayerNorm statistics, none                 16 bytes
    dropout masks, none                        1 byte x d_model for each of resid_dropout and mlp_dropout
    attention dropout, none                    (4 + c + 1) bytes x n_head x T: the probabilities in float32, those that
                                               are left in the compute dtype of c bytes, and the mask. It is the
                                               paper's 5as/h: no fused kernel has dropout. They replace attention's
                                               output by heads and its log-sum-exp; no policy keeps them.

No other [T, T] matrix is kept: attention makes its scores again, a block of queries at a time. At the worst moment of
the backward pass there is besides, for one layer (`_layer_working`), what its policy makes again and its gradients; for
the loss (`_loss_working`), a chunk of logits and their gradients. The larger of the two counts.

Left out: buffers of communication, what the compiler reserves for itself, padding to a TPU's tiles, and the order that
the compiler finds. `topology.compile_step` asks the compiler itself.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig
from gpt_jax.models.attention import MAX_BLOCKS, QUERY_BLOCK, SCORE_ELEMENTS
from gpt_jax.models.losses import CHUNK_ELEMENTS
from gpt_jax.parallel import MeshConfig, axis_sizes

F32 = 4

# Of an MLP's activation, arrays that are kept of its input, its inside and its output together, and masks of a byte.
KEPT_OF_ACTIVATION = {
    'gelu_new': (6, 0),
    'gelu': (4, 0),
    'quick_gelu': (4, 0),
    'relu': (1, 1),
    'relu2': (2, 1),
    'relu6': (1, 1),
    'leaky_relu': (1, 1),
    'silu': (4, 0),
    'mish': (6, 0),
    'hardswish': (3, 1),
    'tanh': (2, 0),
    'sigmoid': (2, 0),
    'linear': (1, 0),
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A model on devices: one way to train it.

    Attributes:
      config: the model.
      mesh: devices along each axis, -1 filled in.
      batch_size: sequences a step, over all devices.
      accumulation_steps: micro-batches that a step is cut into.

    Raises:
      InputError: the micro-batch cannot be divided over the mesh.
    """

    config: GPTConfig
    mesh: MeshConfig
    batch_size: int
    accumulation_steps: int

    def __post_init__(self):
        rows, rest = divmod(self.batch_size, self.accumulation_steps * self.split)
        if rest or not rows:
            raise InputError(
                f'train.batch_size={self.batch_size} in {self.accumulation_steps} micro-batches is not divisible by '
                f'the {self.split} devices of mesh.data={self.mesh.data} x mesh.fsdp={self.mesh.fsdp}; choose a '
                f'multiple, or another mesh'
            )

    @classmethod
    def of(
        cls, config: GPTConfig, mesh: MeshConfig, devices: int, batch_size: int, accumulation_steps: int
    ) -> 'Placement':
        """On so many devices; InputError where the mesh does not have them."""
        return cls(config, MeshConfig(**axis_sizes(mesh, devices)), batch_size, accumulation_steps)

    @property
    def split(self) -> int:
        """Devices that the rows of a batch are spread over."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def devices(self) -> int:
        """All devices of the mesh."""
        return self.split * self.mesh.tensor * self.mesh.context

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch on one device."""
        return self.batch_size // self.accumulation_steps // self.split

    def flags(self, before: 'Placement') -> str:
        """The command line that makes `before` this."""
        keys = {
            'model.remat': lambda p: p.config.remat,
            'mesh.data': lambda p: p.mesh.data,
            'mesh.fsdp': lambda p: p.mesh.fsdp,
            'train.accumulation_steps': lambda p: p.accumulation_steps,
        }
        changed = ((key, get(self)) for key, get in keys.items() if get(self) != get(before))
        return ' '.join(f'--config.{key}={value}' for key, value in changed)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment when it holds the most; see above.

    Attributes:
      parameters, optimizer, gradients: exact.
      kept: activations kept for the backward pass, of all layers.
      working: what one layer's backward pass, or the loss, holds besides.
      batch: token ids, and with a document mask their positions and documents.
      overlap: 0 or negative: gradients of layers that come only where kept activations, or the loss, are gone.
    """

    parameters: int
    optimizer: int
    gradients: int
    kept: int
    working: int
    batch: int
    overlap: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def training_memory(placement: Placement, state: Any, cpu: bool = False, documents: bool = False) -> Memory:
    """The memory of one device.

    Args:
      placement: the model and its devices.
      state: the training state (`params`, `opt_state`, `ema`) as sharded ShapeDtypeStructs.
      cpu: as XLA's CPU backend does it: numbers of 16 bits are held as 32, and where layers are unrolled it merges what
        rematerialisation makes again with what was made before, so that nothing is saved; the loss has small chunks.
      documents: whether the batch has `positions` and `documents` of its tokens, beside these and the targets.
    """
    config, mesh = placement.config, placement.mesh
    if cpu and not config.scan_layers:
        config = dataclasses.replace(config, remat='none')
    itemsize = F32 if cpu else jnp.dtype(config.dtype).itemsize
    tokens = placement.rows * config.block_size / mesh.context
    of_token = sum(size / (mesh.tensor if split else 1) for _, size, split in kept_of_token(config, itemsize))
    # Copies of parameters are split like these.
    of_layer = tokens * of_token + _kept_weights(config, cpu) / (mesh.fsdp * mesh.tensor)
    kept = config.n_layer * of_layer
    layer, loss = _layer_working(config, mesh, tokens, itemsize), _loss_working(config, mesh, tokens, itemsize, cpu)
    # The token table as each device reads it, and the head's gradient, which is whole until the embedding's is added.
    table = _table_copy(config, mesh, itemsize)
    table += config.padded_vocab_size * config.d_model * F32 / mesh.tensor * (1 - 1 / mesh.fsdp)
    parameters = sharded_bytes(state.params)
    gradients, of_blocks = (
        sharded_bytes(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), tree)
        )
        for tree in (state.params, state.params['blocks'])
    )
    if cpu and config.scan_layers and config.has_bands:
        table += of_blocks  # layers scanned in pairs are cut out of the stack: a copy of it, which the CPU keeps
    before = gradients if placement.accumulation_steps > 1 else 0  # the sum so far
    # The backward pass begins with the loss. A scan then has the gradients of all layers as one array from the start;
    # unrolled, they come as kept activations go: what counts is the larger of both ends.
    start = gradients - of_blocks + kept + table + max(loss, layer + (of_blocks if config.scan_layers else 0))
    # Parameters of 16 bits are widened for the length of a step.
    widened = gradients if parameters < gradients else 0
    working = table + max(loss, layer) + widened
    overlap = max(start, gradients) + widened - (gradients + kept + working)
    arrays = 4 if documents else 2
    token_ids = arrays * 4 * placement.batch_size // placement.split * config.block_size // mesh.context
    estimates = map(int, (kept, working, token_ids, overlap))
    return Memory(parameters, sharded_bytes((state.opt_state, state.ema)), gradients + before, *estimates)


def sharded_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded ShapeDtypeStructs on one device."""
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * itemsize for shape, itemsize in shapes)


def kept_of_token(config: GPTConfig, itemsize: int) -> list[tuple[str, float, bool]]:
    """What a layer keeps of a token for its backward pass: name, bytes, and whether mesh.tensor divides them.

    The table above, for the model's policy; `itemsize` is that of the numbers that activations are held in.
    """
    d, f, heads = config.d_model * itemsize, config.d_mlp * itemsize, config.n_head
    arrays, bits = KEPT_OF_ACTIVATION[config.activation]
    inside = max(0, arrays - 2) / (1 if config.scan_layers else 2)
    masks = (config.resid_dropout > 0) + (config.mlp_dropout > 0)
    rows = [
        ('layer input', d, False, 'none dots names full'),
        ('LayerNorm outputs', 2 * d, False, 'none'),
        ('LayerNorm statistics', 4 * F32, False, 'none'),
        ('query, key, value', 3 * d, True, 'none dots names'),
        ('attention output, heads joined', d, True, 'none'),
        ('attention projection', d, False, 'dots'),
        ('residual stream after attention', d, False, 'none'),
        ('MLP up projection', f, True, 'dots names'),
        ('input and output of the activation', min(arrays, 2) * f, True, 'none'),
        ('inside the activation', inside * f + bits * config.d_mlp, True, 'none'),
        ('dropout masks', masks * config.d_model, False, 'none'),
    ]
    if config.attention_dropout > 0:
        # The softmax's own residuals are the row's maximum and sum; the mask takes a byte.
        rows.append(('attention probabilities', heads * config.block_size * (F32 + itemsize + 1), True, 'none'))
        rows.append(('softmax statistics', 2 * heads * F32, True, 'none'))
    else:
        rows.append(('attention output, by heads', d, True, 'none names'))
        rows.append(('attention log-sum-exp', heads * F32, True, 'none names'))
    return [(name, size, split) for name, size, split, policies in rows if config.remat in policies.split()]


def _layer_parameters(config: GPTConfig) -> int:
    """Of one layer's four matrices."""
    return 2 * config.d_model * (2 * config.d_model + config.d_mlp)


def _kept_weights(config: GPTConfig, cpu: bool) -> float:
    """Bytes of a layer's parameters that are kept in another form than the state's."""
    matrices, itemsize = _layer_parameters(config), jnp.dtype(config.dtype).itemsize
    if config.remat != 'none':
        # Dense and banded layers in turn are scanned in pairs, over slices of the stacked parameters.
        return matrices * F32 if config.scan_layers and config.has_bands else 0
    if itemsize < F32:
        return matrices * (F32 if cpu else itemsize)
    # In float32 those of attention are reshaped, and others used as they are, but for the slices.
    return F32 * (matrices if config.scan_layers and config.has_bands else 4 * config.d_model**2)


def _layer_working(config: GPTConfig, mesh: MeshConfig, tokens: float, itemsize: int) -> float:
    """Bytes that the backward pass of one layer works with, besides what was kept for it."""
    d, f = config.d_model * itemsize, config.d_mlp * itemsize
    # Made again: the outputs of both LayerNorms, the residual stream between them, q, k and v, attention's output with
    # its heads joined, and where it is not kept by heads ('names' does) that as well.
    remade = {'none': 0, 'names': 3 * d + 4 * d / mesh.tensor}.get(config.remat, 3 * d + 5 * d / mesh.tensor)
    # The gradients of GELU's output and input, the output itself, and the up projection.
    mlp = {'none': 2, 'full': 4}.get(config.remat, 3) * f
    # The gradients of attention's output, of q, k and v in float32, and of these joined.
    blocks = max(_block_bytes(config, mesh.context, tokens, itemsize, config.band(layer)) for layer in (0, 1))
    attention = 4 * d + 3 * config.d_model * F32 + blocks
    weights = _layer_parameters(config) * itemsize  # cut out of the stack, gathered or converted
    if mesh.fsdp > 1:
        weights += config.d_model * config.d_mlp * F32  # the gradient of a matrix, before it is split
    return weights / mesh.tensor + tokens * (d + remade + max(mlp, attention) / mesh.tensor)  # d: that of the output


def _block_bytes(config: GPTConfig, context: int, tokens: float, itemsize: int, band: int | None) -> float:
    """Bytes for each token that attention's backward pass holds of the blocks it works on; see models/attention.py.

    Float32 scores, probabilities and the gradients of either. In a banded layer also a copy of the window of keys and
    of values that each block sees, and their gradients. Where time is split, the keys and values that visit and
    those that are sent on, the float32 gradients of either, and in dense layers two pairs of halves at a time.
    """
    time, copies = config.block_size / context, 0.0
    if context > 1:
        copies = 2 * 2 * config.d_model * (itemsize + F32)
    if config.attention_dropout > 0:
        scores = config.block_size  # for each token and head: all of them at once
    elif (band is None or band >= config.block_size) and context > 1:
        scores = min(time / 2, max(QUERY_BLOCK, time / 2 / MAX_BLOCKS))
    elif band is None or band >= config.block_size:
        scores = min(time, max(QUERY_BLOCK, time / MAX_BLOCKS))
    else:
        size = min(QUERY_BLOCK, band)
        window = size * (1 + math.ceil((band - 1) / size))
        scores = min(window, max(SCORE_ELEMENTS / (tokens * config.n_head), size * window / time))
        copies += 2 * config.d_model * (itemsize + F32) * scores / size
    return 3 * config.n_head * scores * F32 + copies


def _loss_working(config: GPTConfig, mesh: MeshConfig, tokens: float, itemsize: int, cpu: bool) -> float:
    """Bytes that the final norm and the loss work with, forward and backward, besides `_table_copy`."""
    vocab, time = config.padded_vocab_size / mesh.tensor, max(1, config.block_size // mesh.context)
    # The fewest equal chunks of time whose logits are not too many (see models/losses.py).
    wanted = min(time, math.ceil(tokens * vocab / CHUNK_ELEMENTS['cpu' if cpu else 'accelerator']))
    chunks = next(count for count in range(max(1, wanted), time + 1) if time % count == 0)
    # Logits, and their gradients in the compute dtype: a single chunk's, in float32, are written over the logits.
    logits = tokens * vocab / chunks * (F32 + (0 if chunks == 1 and itemsize == F32 else itemsize))
    # The newest chunk's gradient of the head, beside the sum, which is counted with the gradients.
    head = vocab * config.d_model * F32 if chunks > 1 else 0
    return logits + head + 3 * tokens * config.d_model * itemsize  # its input, the gradients of that and of the norm's


def _table_copy(config: GPTConfig, mesh: MeshConfig, itemsize: int) -> float:
    """Bytes of the token table as each device reads it: in the compute dtype, and whole where fsdp splits it."""
    if itemsize == F32 and mesh.fsdp == 1:
        return 0
    return config.padded_vocab_size * config.d_model * itemsize / mesh.tensor * (1 if config.tie_embeddings else 2)


def smaller(placement: Placement) -> Iterator[Placement]:
    """The same training with less memory: rematerialisation, more of fsdp, smaller micro-batches."""
    meshes = [placement.mesh]
    if placement.mesh.data > 1 and placement.config.d_model % placement.split == 0:
        meshes.append(dataclasses.replace(placement.mesh, data=1, fsdp=placement.split))
    remats = {'none': ('none', 'names', 'full'), 'full': ('full',)}.get(
        placement.config.remat, (placement.config.remat, 'full')
    )
    rows = placement.batch_size // placement.split
    doubled = [placement.accumulation_steps * 2**power for power in range(rows.bit_length())]
    steps = [count for count in (*doubled, rows) if rows % count == 0]
    for mesh in meshes:
        for count in steps:
            for remat in remats:
                config = dataclasses.replace(placement.config, remat=remat)
                changed = Placement(config, mesh, placement.batch_size, count)
                if changed != placement:
                    yield changed


def advice(
    placement: Placement, limit: int, memory: Callable[[Placement], Memory], count: int = 3
) -> tuple[list[tuple[Placement, Memory]], bool]:
    """The least changes after which the estimate is within `limit` bytes.

    Returns:
      Up to `count` pairs of placement and memory, fewest changes first, and True; or where none fits, the smallest, and
      False.
    """

    def effort(changed: Placement) -> tuple:
        # Recomputing less and fewer, larger micro-batches run faster.
        keys = changed.flags(placement).count('--')
        return keys, changed.accumulation_steps, ('none', 'names', 'dots', 'full').index(changed.config.remat)

    fit, tried = [], []
    for changed in sorted(set(smaller(placement)), key=effort):
        tried.append((changed, memory(changed)))
        if tried[-1][1].total <= limit:
            fit.append(tried[-1])
        if len(fit) == count:
            break
    if fit:
        return fit, True
    return sorted(tried, key=lambda pair: pair[1].total)[:1], False
