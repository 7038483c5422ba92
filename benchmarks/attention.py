"""What a banded layer's attention costs beside a dense one's, forward and backward.

    python benchmarks/attention.py [--heads=12 --head_dim=64 --band=256 --times 2048 8192] [--suite]

Runs one after the other at each length and reports milliseconds and the growth from the first length to the last.
Levels: the banded time grows at most 1.3x as fast as the length, and at the last length the band is at least 4x as fast
as dense.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from gpt_jax.models.attention import banded_attention, blockwise_attention

GROWTH_LEVEL, SPEED_LEVEL, ROUNDS = 1.3, 4.0, 7


def compiled(attention, heads: int, length: int, head_dim: int):
    """A function without arguments that runs attention and its gradients once, and its inputs."""
    shape = (1, heads, length, head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.float32) for key in keys)

    @jax.jit
    def both(q, k, v, dout):
        out, gradients = jax.vjp(attention, q, k, v)
        return out, gradients(dout)

    return lambda: jax.block_until_ready(both(q, k, v, dout))


def milliseconds(function) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Prints the table; with --suite exits 1 where a level is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('heads', 12), ('head_dim', 64), ('band', 256)):
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--times', type=int, nargs='+', default=[2048, 8192])
    parser.add_argument('--suite', action='store_true', help='exit 1 where a level is missed')
    a = parser.parse_args()
    scale = a.head_dim**-0.5
    kinds = {
        'dense': lambda q, k, v: blockwise_attention(q, k, v, None, scale),
        'banded': lambda q, k, v: banded_attention(q, k, v, None, scale, a.band),
    }
    print(f'{"context":>8} {"dense, ms":>10} {"banded, ms":>11} {"dense / banded":>15}')
    medians = {kind: [] for kind in kinds}
    for length in a.times:
        functions = {kind: compiled(attend, a.heads, length, a.head_dim) for kind, attend in kinds.items()}
        for kind, function in functions.items():
            function()  # compiles
            # Not in turn: right after hundreds of megabytes of dense scores the band finds neither caches nor pages.
            medians[kind].append(statistics.median(milliseconds(function) for _ in range(ROUNDS)))
        ratio = medians['dense'][-1] / medians['banded'][-1]
        print(f'{length:>8} {medians["dense"][-1]:>10.1f} {medians["banded"][-1]:>11.1f} {ratio:>14.1f}x')
    longer = a.times[-1] / a.times[0]
    growth = {kind: values[-1] / values[0] for kind, values in medians.items()}
    met = growth['banded'] <= GROWTH_LEVEL * longer and ratio >= SPEED_LEVEL
    print(
        f'{longer:.0f}x the context costs {growth["banded"]:.1f}x with a band of {a.band} and {growth["dense"]:.1f}x '
        f'dense: levels <= {GROWTH_LEVEL * longer:.1f}x and {SPEED_LEVEL:.0f}x as fast as dense are '
        f'{"met" if met else "MISSED"}'
    )
    sys.exit(1 if a.suite and not met else 0)


if __name__ == '__main__':
    main()
