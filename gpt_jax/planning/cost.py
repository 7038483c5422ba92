"""Time, money and the decoding cache.

What a step takes (`step_time`) is a model of four terms, to rank ways of training and not to promise a speed: products,
the memory that all else reads and writes, what devices send while others compute, and what they wait for.
"""

import dataclasses
from collections.abc import Sequence

import jax

from gpt_jax.models import GPT, GPTConfig
from gpt_jax.models.config import causal_flops_per_token, training_flops_per_token
from gpt_jax.parallel.devices import Device, ring_bandwidth
from gpt_jax.planning.memory import Placement

SECONDS_A_DAY = 86400
F32, BF16 = 4, 2

# Of the peak, what large products reach; assumed.
PRODUCT_SHARE = 0.75
# Of a token and layer, in multiples of d_model numbers, what everything but products reads and writes in both passes:
# of whole rows (norms, residual streams), and of what mesh.tensor splits (attention, the MLP). Fitted to the rooflines
# of compiled steps on an H100; a scan also copies what it keeps into stacks.
TRAFFIC_WHOLE, TRAFFIC_SPLIT, TRAFFIC_STACKS = 60, 90, 80
# Of the forward and backward pass together, what a policy makes again: a whole forward pass, or attention's projection.
MADE_AGAIN = {'none': 0.0, 'dots': 0.05, 'names': 1 / 36, 'full': 1 / 3}


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


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a training step by the model of `step_time`.

    Attributes:
      products: matrix products.
      memory: all other kernels.
      beside: collectives that can run beside these: parameters and gradients over fsdp and data, ring attention.
      waiting: collectives that nothing else can run beside: activations over tensor.
      mfu: the share of the peak that 6 N + 12 L D T makes of it.
    """

    products: float
    memory: float
    beside: float
    waiting: float
    mfu: float

    @property
    def total(self) -> float:
        """Of a step."""
        return max(self.products + self.memory, self.beside) + self.waiting


def step_time(placement: Placement, device: Device, torus: Sequence[int] = ()) -> StepTime:
    """What a step takes on devices of which bandwidths are known, see `parallel.devices`; `torus` is of TPUs."""
    config, mesh, steps = placement.config, placement.mesh, placement.accumulation_steps
    # Of all policies the counts are the same, and are made once.
    counted = dataclasses.replace(config, remat='none')
    itemsize = BF16 if config.compute_dtype != 'f32' else F32
    tokens = placement.batch_size * config.block_size / placement.split / mesh.context  # of a device, in a step
    d, layers = config.d_model, config.n_layer
    again = MADE_AGAIN[config.remat]
    per_device = tokens / mesh.tensor
    products = per_device * causal_flops_per_token(counted) * (1 + again) / (device.peak_flops * PRODUCT_SHARE)

    weights = counted.num_parameters / mesh.tensor  # that a device computes with
    numbers = TRAFFIC_WHOLE + TRAFFIC_SPLIT / mesh.tensor + (TRAFFIC_STACKS if config.remat == 'none' else 0)
    traffic = tokens * layers * d * itemsize * numbers * (1 + again)
    traffic += 3 * per_device * config.padded_vocab_size * F32  # logits and their gradients
    # Of each micro-batch: matrices in both passes, and their gradients, which are added up. Of a step: AdamW.
    traffic += steps * weights * (3 * itemsize + 2 * F32) + 10 * F32 * weights / mesh.fsdp
    memory = traffic / device.memory_bandwidth

    def send(axis: str, amount: float) -> float:
        """Seconds of a ring in which each device sends this amount along an axis, less the part that it keeps."""
        size = getattr(mesh, axis)
        if size == 1:
            return 0.0
        # The axes of a mesh are laid over the devices in order, the last one over neighbours.
        after = {'data': mesh.fsdp * mesh.tensor * mesh.context, 'fsdp': mesh.tensor * mesh.context}
        stride = after.get(axis, mesh.context if axis == 'tensor' else 1)
        hosts = 1 if device.per_host is None else max(1, -(-size * stride // device.per_host))
        bandwidth = ring_bandwidth(device, size, min(size, hosts), placement.devices, torus)
        return amount * (size - 1) / size / bandwidth

    # Parameters are gathered for either pass, in the compute dtype; gradients are summed up in float32.
    beside = send('fsdp', steps * weights * (2 * itemsize + F32))
    beside += send('data', steps * weights / mesh.fsdp * 2 * F32)
    # Keys and values go around the ring, and in the backward pass their gradients as well.
    beside += send('context', layers * tokens * mesh.context * d / mesh.tensor * (2 * 2 * itemsize + 2 * F32))
    # Megatron's all-reduces of activations: two in each pass, and those of what is made again.
    rounds = 4 + {'none': 0, 'dots': 0, 'names': 1, 'full': 1}[config.remat]
    waiting = send('tensor', 2 * rounds * layers * tokens * d * itemsize)
    seconds = StepTime(products, memory, beside, waiting, 0.0).total
    work = placement.batch_size * config.block_size * training_flops_per_token(counted) / placement.devices
    return StepTime(products, memory, beside, waiting, work / seconds / device.peak_flops)
