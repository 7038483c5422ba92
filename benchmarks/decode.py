"""What a new token costs: from the key-value cache, and by running the whole text again.

    python benchmarks/decode.py [--width=256 --layers=4 --context=1024] [--suite]

Generates 16, 64, 256, ... tokens greedily after a prompt of 8, in one cache of the full context, and reports the
seconds a token. With a cache the work of a token is the same wherever it stands; without one it grows with the text.
Level: a token among the most costs at most 1.3x one among the fewest.
"""

import argparse
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.inference import Sampling, decode
from gpt_jax.models import GPT, GPT2

PROMPT, LEVEL, ROUNDS = 8, 1.3, 5


def cached_seconds(model: GPT, params: dict, count: int) -> float:
    """Seconds to generate `count` tokens from the cache, its length that of the context."""
    context = model.config.block_size
    prompt = np.zeros((1, PROMPT), np.int32)
    sampling = Sampling(greedy=True)
    began = time.perf_counter()
    # A token that is not in the vocabulary never ends the text.
    out = decode.decode_loop(model, params, prompt, PROMPT, count, context, -1, 0, sampling)
    jax.block_until_ready(out)
    return time.perf_counter() - began


@functools.partial(jax.jit, static_argnames='model')
def _next_token(model: GPT, params: dict, tokens: jax.Array, length: int) -> jax.Array:
    return jnp.argmax(model.apply({'params': params}, tokens)[0, length - 1])


def uncached_seconds(model: GPT, params: dict, count: int) -> float:
    """Seconds for the last of `count` tokens when the text so far, padded to a multiple of 64, is run again."""
    length = PROMPT + count
    tokens = np.zeros((1, min(-(-length // 64) * 64, model.config.block_size)), np.int32)
    began = time.perf_counter()
    _next_token(model, params, tokens, length).block_until_ready()
    return time.perf_counter() - began


def main() -> None:
    """Prints the table; with --suite exits 1 where the level is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('width', 256), ('layers', 4), ('heads', 4), ('context', 1024), ('vocab', 4096)):
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--suite', action='store_true', help='exit 1 where the level is missed')
    a = parser.parse_args()
    model = GPT2(a.vocab, a.context, a.layers, a.heads, a.width)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    counts = [count for count in (16, 64, 256, 512, 1000, 2000) if PROMPT + count <= a.context]
    for count in counts:  # compiles
        cached_seconds(model, params, count)
        uncached_seconds(model, params, count)
    print(f'{"new tokens":>10} {"cached, ms a token":>20} {"uncached, ms the last":>22}')
    costs = []
    for count in counts:
        costs.append(statistics.median(cached_seconds(model, params, count) for _ in range(ROUNDS)) / count)
        again = statistics.median(uncached_seconds(model, params, count) for _ in range(ROUNDS))
        print(f'{count:>10} {1e3 * costs[-1]:>20.2f} {1e3 * again:>22.2f}')
    ratio = costs[-1] / costs[0]
    met = ratio <= LEVEL
    verdict = 'met' if met else 'MISSED'
    print(f'a token among {counts[-1]} costs {ratio:.2f}x one among {counts[0]}: level <= {LEVEL}x is {verdict}')
    sys.exit(1 if a.suite and not met else 0)


if __name__ == '__main__':
    main()
