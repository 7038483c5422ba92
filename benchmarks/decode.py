"""Generating beside Hugging Face transformers: the same weights, the same prompts, on this machine's CPU.

    python benchmarks/decode.py            batches of 1 and 8
    python benchmarks/decode.py --suite    every row; exits 1 where a level is missed

A row continues random prompts greedily, in float32, with random weights in GPT-2 small's shapes. Both sides take turns
in one process, so that a busy machine slows both; a ratio is the median over the rounds. The last row is held against
memory: a token of one text needs every weight once, and this machine reads so many bytes a second.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.inference import Beams, Engine, Sampling, StoppingCriteria, generate
from gpt_jax.models import preset

try:
    import torch
    import transformers
except ImportError:
    sys.exit('the peer is missing; install it: pip install torch transformers')

PROMPT, NEW = 32, 128
# What the last token of 512 may cost beside that of 128, and which part of the memory's speed decoding reaches.
LONG_LEVEL, MEMORY_LEVEL = 4.5, 0.7
NEVER = -1  # a token that ends no text

Work = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison with the peer, and the least speed relative to it."""

    batch: int
    prompt: int = PROMPT
    new: int = NEW
    beams: int = 1
    level: float = 0.0

    @property
    def name(self) -> str:
        """'batch 8: 32 + 128 tokens'."""
        beams = f', {self.beams} beams' if self.beams > 1 else ''
        return f'batch {self.batch}{beams}: {self.prompt} + {self.new} tokens'


ROWS = (Row(1, level=1.9), Row(8, level=2.0))
MORE_ROWS = (Row(1, prompt=900, new=1, level=1.0), Row(1, beams=4, level=1.5))


def make_peer(model, params) -> transformers.GPT2LMHeadModel:
    """The same function in PyTorch."""
    c = model.config
    sizes = {'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.d_model, 'n_positions': c.block_size}
    config = transformers.GPT2Config(vocab_size=c.vocab_size, **sizes, eos_token_id=None, bos_token_id=None)
    peer = transformers.GPT2LMHeadModel(config).eval()
    blocks = jax.tree.map(np.asarray, params['blocks'])
    weights = {'wte.weight': params['wte'][: c.vocab_size], 'wpe.weight': params['wpe']}
    weights |= {'ln_f.weight': params['ln_f']['scale'], 'ln_f.bias': params['ln_f']['bias']}
    for layer in range(c.n_layer):
        for theirs, ours, shape in (
            ('attn.c_attn', blocks['attention']['qkv'], (c.d_model, 3 * c.d_model)),
            ('attn.c_proj', blocks['attention']['out'], (c.d_model, c.d_model)),
            ('mlp.c_fc', blocks['mlp']['up'], (c.d_model, c.d_mlp)),
            ('mlp.c_proj', blocks['mlp']['down'], (c.d_mlp, c.d_model)),
        ):
            weights[f'h.{layer}.{theirs}.weight'] = ours['kernel'][layer].reshape(shape)
            weights[f'h.{layer}.{theirs}.bias'] = ours['bias'][layer].reshape(-1)
        for norm in ('ln_1', 'ln_2'):
            weights[f'h.{layer}.{norm}.weight'] = blocks[norm]['scale'][layer]
            weights[f'h.{layer}.{norm}.bias'] = blocks[norm]['bias'][layer]
    state = {f'transformer.{name}': torch.tensor(np.array(array)) for name, array in weights.items()}
    state['lm_head.weight'] = state['transformer.wte.weight']
    peer.load_state_dict(state)
    return peer


def ours(engine: Engine, row: Row, prompts: np.ndarray) -> list[list[int]]:
    """The new tokens of each prompt."""
    stopping, strategy = StoppingCriteria(row.new, NEVER), Beams(row.beams) if row.beams > 1 else None
    found = generate(engine, prompts.tolist(), Sampling(greedy=True), stopping, strategy=strategy)
    return [of_prompt[0].tokens for of_prompt in found]


def theirs(peer: transformers.GPT2LMHeadModel, row: Row, prompts: np.ndarray) -> list[list[int]]:
    """The same by the peer."""
    tokens = torch.tensor(prompts)
    counts = {'max_new_tokens': row.new, 'num_beams': row.beams, 'do_sample': False, 'pad_token_id': 0}
    out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), **counts)
    return out[:, row.prompt :].tolist()


def seconds(work: Work) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bytes_a_token(engine: Engine) -> int:
    """What a step of one text reads: every parameter but the tables, of which the tied head's is read whole."""
    tables = sum(engine.params[name].nbytes for name in ('wpe',))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)) - tables


def compare(row: Row, engine: Engine, peer, rounds: int) -> bool:
    """Prints a row; whether its level is met."""
    prompts = np.random.default_rng(0).integers(0, engine.model.config.vocab_size, (row.batch, row.prompt))
    same = ours(engine, row, prompts) == theirs(peer, row, prompts)  # compiles and warms up as well
    pairs = []
    for _ in range(rounds):
        pairs.append((seconds(lambda: ours(engine, row, prompts)), seconds(lambda: theirs(peer, row, prompts))))
    speed = statistics.median(peers / own for own, peers in pairs)
    own, peers = (statistics.median(column) for column in zip(*pairs, strict=True))
    count = row.batch * row.new
    met = speed >= row.level
    print(
        f'{row.name:<36} {count / own:>8.1f} {count / peers:>8.1f} {speed:>7.2f}x {row.level:>6.1f}x '
        f'{"met" if met else "MISSED":>7}   {"same tokens" if same else "other tokens"}'
    )
    return met


def against_itself(engine: Engine, rounds: int) -> bool:
    """Prints what 512 tokens cost beside 128, and the share of the memory's speed; whether both levels are met."""
    prompts = np.random.default_rng(0).integers(0, engine.model.config.vocab_size, (1, PROMPT))
    short, long = Row(1), Row(1, new=512)
    data = torch.ones(bytes_a_token(engine) // 4)
    for warm in (lambda: ours(engine, short, prompts), lambda: ours(engine, long, prompts), data.sum):
        warm()
    costs, shares = [], []
    for _ in range(rounds):
        few, many = (seconds(lambda row=row: ours(engine, row, prompts)) for row in (short, long))
        # Summing as many bytes as a token needs is the fastest way to read them that is at hand.
        reading = min(seconds(data.sum) for _ in range(5))
        costs.append(many / few)
        shares.append(reading * NEW / few)
    cost, share = statistics.median(costs), statistics.median(shares)
    print(f'512 new tokens cost {cost:.2f}x of 128 (level <= {LONG_LEVEL}x)')
    print(f'batch 1 runs at {share:.0%} of what reading the weights allows (level >= {MEMORY_LEVEL:.0%})')
    return cost <= LONG_LEVEL and share >= MEMORY_LEVEL


def main() -> None:
    """Prints the table; with --suite exits 1 where a level is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', action='store_true', help='every row; exit 1 where a level is missed')
    parser.add_argument('--rounds', type=int, default=3, help='turns of both sides')
    parser.add_argument('--preset', default='gpt2-small', help="a size of GPT-2's")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    transformers.logging.set_verbosity_error()
    model = preset(arguments.preset)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
    engine, peer = Engine(model, params), make_peer(model, params)
    print(f'{"":<36} {"tokens/s":>8} {"peer":>8} {"speed":>8} {"level":>7}')
    rows = ROWS + MORE_ROWS if arguments.suite else ROWS
    met = [compare(row, engine, peer, arguments.rounds) for row in rows]
    met.append(against_itself(engine, arguments.rounds))
    print(f'{sum(met)} of {len(met)} levels met')
    sys.exit(1 if arguments.suite and not all(met) else 0)


if __name__ == '__main__':
    main()
