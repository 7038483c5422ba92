"""How fast data are made and read: tokenising, the loader, opening shards, and what a training run waits for.

    python benchmarks/data.py [--rounds=5] [--suite]

Tokenising is from documents to arrays of ids, by a tokenizer of 4 096 tokens on the documentation of Python; its rate
is given as a share of that of the raw batch encoder of the `tokenizers` library, which runs in turn with it. A batch
is 8 rows of 1 024 tokens, of one memory-mapped shard, and of a mixture of three with the document mask. The training
run is the quickstart; a stall is a step whose batch was not there when it was asked for, the first step left out,
for which nothing could be ready. Levels: tokenising >= 0.9x, a batch < 0.5 ms, 1 000 shards < 1 s, no stall.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from gpt_jax.data import Batches, Tokenizer, Tokens, python_docs, read_header, write_shard
from gpt_jax.data.batches import TokenSource
from gpt_jax.data.corpus import Passage
from gpt_jax.data.tokenizer import token_chunks, train_bpe

TOKENISING_LEVEL, BATCH_LEVEL_MS, SHARDS_LEVEL = 0.9, 0.5, 1.0
SHARDS, STEPS = 1000, 60


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def tokenising_share(tokenizer: Tokenizer, documents: list[str], rounds: int) -> tuple[float, float]:
    """Our rate in MB/s, and as a share of the raw encoder's: medians over the rounds."""
    raw = Tokenizer.from_json(tokenizer.to_json())._inner
    passages = [Passage('train', document) for document in documents]
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(seconds(lambda: raw.encode_batch_fast(documents, add_special_tokens=False)))
        ours.append(seconds(lambda: list(token_chunks(tokenizer, passages))))
    size = sum(len(document.encode()) for document in documents)
    share = statistics.median(their / our for their, our in zip(theirs, ours, strict=True))
    return size / 1e6 / statistics.median(ours), share


def batch_ms(batches: Batches) -> float:
    """Median milliseconds of a batch."""
    batches.rows(0)
    return 1000 * statistics.median(seconds(lambda step=step: batches.rows(step)) for step in range(1, 301))


def open_seconds(folder: pathlib.Path, tokenizer: Tokenizer) -> float:
    """Seconds to open many shards as one array and to read a token of each."""
    paths = [folder / f'{number:05d}.bin' for number in range(SHARDS)]
    for path in paths:
        write_shard(path, [np.arange(200) % tokenizer.vocab_size], tokenizer)

    def open_all():
        tokens = Tokens([read_header(path, tokenizer) for path in paths])
        return [tokens[place] for place in range(0, len(tokens), 200)]

    return seconds(open_all)


def stalls(folder: pathlib.Path) -> tuple[int, float]:
    """Steps that waited for their batch, and the longest wait in milliseconds, of a run of the quickstart."""
    command = [sys.executable, '-m', 'gpt_jax.main', '--config=configs/quickstart.py', f'--workdir={folder}']
    keys = {'train.steps': STEPS, 'train.log_every_steps': 1, 'schedule.warmup_steps': 1}
    command += [f'--config.{key}={value}' for key, value in keys.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    waits = [row['data_wait_ms'] for row in rows if 'data_wait_ms' in row][1:]
    return sum(wait > 0 for wait in waits), max(waits)


def main() -> None:
    """Prints the table; with --suite exits 1 where a level is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5, help='of tokenising')
    parser.add_argument('--suite', action='store_true', help='exit 1 where a level is missed')
    arguments = parser.parse_args()
    documents = list(python_docs.documents())
    tokenizer = train_bpe(documents, 4096)
    rate, share = tokenising_share(tokenizer, documents, arguments.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 20_000_000)
        tokens = Tokens([write_shard(folder / 'tokens.bin', [ids], tokenizer)])
        plain = batch_ms(Batches(tokens, 8, 1024, seed=0))
        sources = [TokenSource(str(weight), tokens, Fraction(weight)) for weight in (6, 3, 1)]
        masked = batch_ms(Batches(sources, 8, 1024, seed=0, end_of_text=tokenizer.end_of_text))
        opened = open_seconds(folder, tokenizer)
        count, longest = stalls(folder / 'run')
    rows = [
        (f'tokenising, {rate:.1f} MB/s', f'{share:.2f}x', f'>= {TOKENISING_LEVEL}x', share >= TOKENISING_LEVEL),
        ('a batch of 8 x 1024', f'{plain:.2f} ms', f'< {BATCH_LEVEL_MS} ms', plain < BATCH_LEVEL_MS),
        ('the same, three sources, masked', f'{masked:.2f} ms', f'< {BATCH_LEVEL_MS} ms', masked < BATCH_LEVEL_MS),
        (f'opening {SHARDS} shards', f'{opened:.2f} s', f'< {SHARDS_LEVEL:.0f} s', opened < SHARDS_LEVEL),
        (f'stalls in {STEPS} steps, longest wait {longest:.2f} ms', str(count), '0', count == 0),
    ]
    for what, value, level, met in rows:
        print(f'{what:50} {value:>10}   level {level:10} {"met" if met else "MISSED"}')
    missed = [what for what, _, _, met in rows if not met]
    print(f'missed: {"; ".join(missed)}' if missed else 'all levels are met')
    sys.exit(1 if missed and arguments.suite else 0)


if __name__ == '__main__':
    main()
