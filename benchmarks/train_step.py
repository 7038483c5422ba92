"""One optimizer step beside PyTorch: the same GPT-2, the same batch, on this machine's CPU.

    python benchmarks/train_step.py            the quickstart's size
    python benchmarks/train_step.py --suite    every size; exits 1 where a level is missed

A step is forward, backward, clipping by global norm and AdamW. The peer is Hugging Face's GPT2LMHeadModel with its
default attention (PyTorch's fused kernel) and PyTorch's fused AdamW. The two take turns in one process, so that a busy
machine slows both; the ratio is the median over the rounds.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax

from gpt_jax.config import OptimizerConfig
from gpt_jax.models import GPT, GPT2
from gpt_jax.parallel import MeshConfig, batch_sharding, make_mesh
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.step import init_state, make_train_step

try:
    import torch
    import transformers
except ImportError:
    sys.exit('the peer is missing; install it: pip install torch transformers')

LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0

Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Size:
    """What one row measures, and the least speed relative to the peer (None: no level)."""

    layers: int = 4
    heads: int = 6
    width: int = 192
    context: int = 128
    batch: int = 16
    vocab: int = 2048
    dtype: str = 'f32'
    level: float | None = None

    @property
    def name(self) -> str:
        """'4x256, 8x256 tokens, vocab 4096, f32'."""
        return f'{self.layers}x{self.width}, {self.batch}x{self.context} tokens, vocab {self.vocab}, {self.dtype}'

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.context

    def flops(self, model: GPT) -> float:
        """Of one step: 6 a parameter (positions left out) and 12 L T D of attention a token."""
        parameters = model.config.num_parameters - self.context * self.width
        return self.tokens * (6 * parameters + 12 * self.layers * self.context * self.width)


QUICKSTART = Size(level=0.8)
SUITE = (
    QUICKSTART,
    Size(layers=6, heads=6, width=384, context=256, batch=16, vocab=65, level=0.8),
    Size(layers=12, heads=12, width=768, context=256, batch=2, vocab=50257),
)


def batches(size: Size) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random tokens and targets, int32 [batch, context]."""
    rng = np.random.default_rng(0)
    while True:
        tokens = rng.integers(0, size.vocab, (size.batch, size.context + 1), dtype=np.int32)
        yield tokens[:, :-1], tokens[:, 1:]


def jax_step(size: Size, model: GPT) -> Step:
    """Our step: the very one that a training run takes."""
    settings = OptimizerConfig(LEARNING_RATE, 0.9, 0.95, epsilon=1e-8, weight_decay=WEIGHT_DECAY, clip_norm=CLIP)
    schedule, mesh = optax.constant_schedule(LEARNING_RATE), make_mesh(MeshConfig())
    optimizer = make_optimizer(settings, schedule)
    step, where = make_train_step(model, optimizer, schedule, mesh), batch_sharding(mesh)
    state, data = init_state(model, optimizer, mesh, seed=0), batches(size)

    def run() -> None:
        nonlocal state
        tokens, targets = next(data)
        state, metrics = step(state, jax.device_put({'tokens': tokens, 'targets': targets}, where))
        jax.block_until_ready((state, metrics))

    return run


def torch_step(size: Size) -> Step:
    """The peer's step; bf16 is autocast, PyTorch's mixed precision."""
    config = transformers.GPT2Config(
        vocab_size=size.vocab, n_positions=size.context, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{'params': matrices, 'weight_decay': WEIGHT_DECAY}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    data = batches(size)

    def run() -> None:
        tokens, targets = (torch.from_numpy(array.astype(np.int64)) for array in next(data))
        with torch.autocast('cpu', torch.bfloat16, enabled=size.dtype == 'bf16'):
            logits = model(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return run


def seconds(step: Step) -> float:
    """Of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(size: Size, steps: int) -> float:
    """Prints the row of `size`; returns our speed relative to the peer's."""
    shape = dict(vocab_size=size.vocab, block_size=size.context, n_layer=size.layers, n_head=size.heads)
    model = GPT2(**shape, d_model=size.width, compute_dtype=size.dtype)
    ours, peer = jax_step(size, model), torch_step(size)
    for step in (ours, ours, peer, peer):
        step()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(steps)]
    ratio = statistics.median(theirs / our for our, theirs in pairs)
    columns = [statistics.median(column) for column in zip(*pairs, strict=True)]
    cells = [f'{size.tokens / s:8.0f} {size.flops(model) / s / 1e9:8.0f}' for s in columns]
    print(f'{size.name:44} {cells[0]} {cells[1]} {ratio:6.2f}x', flush=True)
    return ratio


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key in ('layers', 'heads', 'width', 'context', 'batch', 'vocab'):
        parser.add_argument(f'--{key}', type=int, default=getattr(QUICKSTART, key), help='default: %(default)s')
    parser.add_argument('--dtype', choices=('f32', 'bf16'), default='f32', help='of matmuls; default: %(default)s')
    parser.add_argument('--steps', type=int, default=15, help='rounds of one step each; default: %(default)s')
    parser.add_argument('--suite', action='store_true', help='every size')
    return parser.parse_args()


def main() -> int:
    """Exit status: 1 where a level is missed."""
    options = vars(arguments())
    suite, steps = options.pop('suite'), options.pop('steps')
    single = Size(**options)
    single = dataclasses.replace(
        single, level=QUICKSTART.level if single == dataclasses.replace(QUICKSTART, level=None) else None
    )
    sizes = SUITE if suite else (single,)
    print(f'jax {jax.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads; {steps} rounds')
    print(f'{"":44} {"gpt_jax":>17} {"PyTorch":>17}\n{"":44}' + ' tokens/s  GFLOP/s' * 2 + '   speed')
    ratios = [measure(size, steps) for size in sizes]
    judged = [(ratio, size.level) for ratio, size in zip(ratios, sizes, strict=True) if size.level is not None]
    if not judged:
        print('no level is set for this size')
        return 0
    missed = sum(ratio < level for ratio, level in judged)
    verdict = 'level missed' if missed else 'level met'
    print(f'{verdict}: {len(judged) - missed} of {len(judged)} sizes reach {QUICKSTART.level}x the speed of PyTorch')
    return int(missed > 0)


if __name__ == '__main__':
    sys.exit(main())
