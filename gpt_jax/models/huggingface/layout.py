"""Where each of our parameters stands in a Hugging Face file, for GPT-2 and for GPT-Neo.

Both keep one tensor a layer where we stack them. GPT-2's matrices are [in, out] like ours, with query, key and value
in one; GPT-Neo's are [out, in], with query, key and value apart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.models.config import GPTConfig

GPT2, GPT_NEO = 'gpt2', 'gpt_neo'

# Causal masks that old files carry along: they are not weights, and every model makes its own.
BUFFERS = r'h\.\d+\.attn\.(attention\.)?(bias|masked_bias)'

HEAD = 'lm_head.weight'


class Tensor(NamedTuple):
    """One tensor of a file, and the part of a parameter that it fills.

    Attributes:
      name: without the prefix `transformer.`.
      shape: in the file.
      index: the part of the parameter: `parameter[index]`, reshaped, is the tensor.
      transposed: whether it is so only after transposing the tensor.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[Any, ...]
    transposed: bool = False


class Parameter(NamedTuple):
    """One parameter of ours: its path in the tree, its shape, and the tensors that fill it (but for padded rows)."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]


def layout(config: GPTConfig, family: str) -> list[Parameter]:
    """Every parameter of a model of this architecture; `family` is 'gpt2' or 'gpt_neo'."""
    d, rows = config.d_model, slice(0, config.vocab_size)

    def table(name: str, path: str, used: int, all_rows: int) -> Parameter:
        return Parameter((path,), (all_rows, d), (Tensor(name, (used, d), (slice(0, used),)),))

    parameters = [
        table('wte.weight', 'wte', config.vocab_size, config.padded_vocab_size),
        table('wpe.weight', 'wpe', config.block_size, config.block_size),
        *_blocks(config, family),
        *(Parameter(('ln_f', ours), (d,), (Tensor(f'ln_f.{theirs}', (d,), ()),)) for ours, theirs in NORM),
    ]
    if not config.tie_embeddings:
        head = Tensor(HEAD, (config.vocab_size, d), (rows,))
        parameters.append(Parameter(('lm_head',), (config.padded_vocab_size, d), (head,)))
    return parameters


def parameter_shapes(config: GPTConfig) -> Any:
    """The parameter tree of a model as jax.ShapeDtypeStruct, float32, layers stacked."""
    shapes = {entry.path: jax.ShapeDtypeStruct(entry.shape, jnp.float32) for entry in layout(config, GPT2)}
    if not config.qkv_bias:
        del shapes['blocks', 'attention', 'qkv', 'bias']
    return nested(shapes)


def nested(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """{('a', 'b'): x} -> {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


NORM = (('scale', 'weight'), ('bias', 'bias'))


def _blocks(config: GPTConfig, family: str) -> list[Parameter]:
    d, f, heads = config.d_model, config.d_mlp, (config.n_head, config.head_dim)
    neo = family == GPT_NEO

    def stacked(path: str, shape: tuple[int, ...], *tensors: Tensor) -> Parameter:
        """`tensors` are those of one layer, with {} where its number goes."""
        layers = range(config.n_layer)
        filled = (
            tensor._replace(name=tensor.name.format(layer), index=(layer, *tensor.index))
            for layer in layers
            for tensor in tensors
        )
        return Parameter(('blocks', *path.split('/')), (config.n_layer, *shape), tuple(filled))

    def matrix(name: str, inputs: int, outputs: int, *index: Any) -> Tensor:
        return Tensor(name, (outputs, inputs) if neo else (inputs, outputs), index, transposed=neo)

    every = slice(None)
    if neo:
        out = 'h.{}.attn.attention.out_proj'
        parts = ((f'h.{{}}.attn.attention.{part}_proj.weight', (every, i)) for i, part in enumerate('qkv'))
        qkv = [stacked('attention/qkv/kernel', (d, 3, *heads), *(matrix(name, d, d, *i) for name, i in parts))]
    else:
        out = 'h.{}.attn.c_proj'
        qkv = [
            stacked('attention/qkv/kernel', (d, 3, *heads), matrix('h.{}.attn.c_attn.weight', d, 3 * d)),
            stacked('attention/qkv/bias', (3, *heads), Tensor('h.{}.attn.c_attn.bias', (3 * d,), ())),
        ]
    return [
        *(
            stacked(f'{norm}/{ours}', (d,), Tensor(f'h.{{}}.{norm}.{theirs}', (d,), ()))
            for norm in ('ln_1', 'ln_2')
            for ours, theirs in NORM
        ),
        *qkv,
        stacked('attention/out/kernel', (*heads, d), matrix(f'{out}.weight', d, d)),
        stacked('attention/out/bias', (d,), Tensor(f'{out}.bias', (d,), ())),
        stacked('mlp/up/kernel', (d, f), matrix('h.{}.mlp.c_fc.weight', d, f)),
        stacked('mlp/up/bias', (f,), Tensor('h.{}.mlp.c_fc.bias', (f,), ())),
        stacked('mlp/down/kernel', (f, d), matrix('h.{}.mlp.c_proj.weight', f, d)),
        stacked('mlp/down/bias', (d,), Tensor('h.{}.mlp.c_proj.bias', (d,), ())),
    ]
