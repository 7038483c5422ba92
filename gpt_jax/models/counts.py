"""What a model costs, counted from its description alone: parameters by part, and arithmetic a token."""

import dataclasses

from gpt_jax.models.config import GPTConfig


def parameters_by_part(config: GPTConfig) -> dict[str, int]:
    """Trainable scalars of each part, without the padding of the vocabulary; they add up to `num_parameters`."""
    d, f, n = config.d_model, config.d_mlp, config.n_layer
    qkv = 3 * d * d + (3 * d if config.qkv_bias else 0)
    parts = {
        'token embedding': config.vocab_size * d,
        'position embedding': config.block_size * d,
        'attention': n * (qkv + d * d + d),
        'MLP': n * (2 * d * f + f + d),
        'LayerNorm': n * 4 * d + 2 * d,
    }
    return parts if config.tie_embeddings else parts | {'output head': config.vocab_size * d}


def mean_keys(config: GPTConfig, layer: int) -> float:
    """Keys that a query of `layer` is counted with, by the mean over a sequence of block_size tokens.

    A dense layer counts all T of them, as the PaLM paper does, though the causal mask hides half. A banded layer
    counts what its queries see: the t-th of them min(t, band).
    """
    time, band = config.block_size, config.band(layer)
    if band is None or band >= time:
        return time
    return (band * (band + 1) / 2 + (time - band) * band) / time


def training_flops_per_token(config: GPTConfig) -> float:
    """6 N + 12 D (keys a query is counted with, summed over the layers): forward and backward.

    N counts all parameters but the position embeddings (PaLM paper, appendix B). With dense layers alone it is the
    usual 6 N + 12 L D T.
    """
    weights = config.num_parameters - config.block_size * config.d_model
    return 6 * weights + 12 * config.d_model * sum(mean_keys(config, layer) for layer in range(config.n_layer))


def causal_flops_per_token(config: GPTConfig) -> float:
    """The same with nothing counted that the causal mask hides: a dense layer's queries see (T + 1) / 2 keys."""
    dense = dataclasses.replace(config, attention_pattern='dense')
    hidden = sum(mean_keys(config, layer) == mean_keys(dense, layer) for layer in range(config.n_layer))
    return training_flops_per_token(config) - 12 * config.d_model * hidden * (config.block_size - 1) / 2
