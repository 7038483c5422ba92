"""Time, money and the decoding cache."""

import dataclasses

import jax

from gpt_jax.models import GPT, GPTConfig

SECONDS_A_DAY = 86400


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
      days: of wall time.
      device_hours: days x 24 x devices.
      dollars: None where no price is known.
    """

    days: float
    device_hours: float
    dollars: float | None


def training_cost(flops: float, devices: int, peak_flops: float, mfu: float, dollars_per_hour: float | None) -> Cost:
    """Of `flops` in all, on `devices` of `peak_flops` FLOP/s each, of which the share `mfu` is used."""
    days = flops / (devices * peak_flops * mfu) / SECONDS_A_DAY
    hours = days * 24 * devices
    return Cost(days, hours, None if dollars_per_hour is None else hours * dollars_per_hour)


def cache_bytes(config: GPTConfig, batch: int, length: int) -> tuple[int, int]:
    """Bytes of the key-value cache for `length` tokens of `batch` sequences, and of one without bands.

    Raises:
      ValueError: `length` exceeds the model's block_size.
    """

    def of(config: GPTConfig) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: GPT(config).init_cache(batch, length)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return of(config), of(dataclasses.replace(config, attention_pattern='dense'))
