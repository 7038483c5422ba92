"""What preparing a large text takes: memory of all processes together, and speed; and opening many shards.

    python benchmarks/prepare.py [--gigabytes=1.0] [--workers=2] [--text=documents|line|solid] [--suite]

The text is made here: lines of the Python documentation in random order, with words that occur once, as documents of
some kilobytes; with --text=line one running line, with --text=solid one document without a space. Memory is the sum of
the processes' resident sizes, sampled ten times a second; pages that they share count several times. Levels: memory <
1.5 GB for a text of 1 GB; 1 000 shards open in < 1 s.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import psutil

from gpt_jax.data import Tokens, python_docs, read_header, write_shard
from gpt_jax.data.tokenizer import train_bpe

MEMORY_LEVEL, OPEN_LEVEL = 1.5e9, 1.0
SHARDS = 1000


def write_text(path: pathlib.Path, size: int) -> None:
    """Some documents over and over, in another order of their lines each time."""
    rng = random.Random(0)
    lines = [line for text in python_docs.documents() for line in text.splitlines() if line.strip()]
    with open(path, 'w', encoding='utf-8') as file:
        while file.tell() < size:
            chosen = rng.choices(lines, k=rng.randint(5, 200))
            file.write('\n'.join(chosen) + f'\n{rng.getrandbits(64):x}\n\n')


def write_line(path: pathlib.Path, size: int, gap: str) -> None:
    """Words of the documentation in random order with `gap` between them, after 300 short documents."""
    rng = random.Random(0)
    words = ' '.join(python_docs.documents()).split()
    with open(path, 'w', encoding='utf-8') as file:
        file.writelines(f'a short document, number {number}\n\n' for number in range(300))
        while file.tell() < size:
            file.write(gap.join(rng.choices(words, k=20_000)) + gap)


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its seconds, and the most bytes that it and its children held."""
    began, most = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        held = 0
        for each in (process, *process.children(recursive=True)):
            try:
                held += each.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it ended in between
        most = max(most, held)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f'the command failed: {" ".join(command)}')
    return time.perf_counter() - began, most


def seconds_to_open(folder: pathlib.Path) -> float:
    """Writes shards, then opens them as a run does."""
    tokenizer = train_bpe(['a'], 257)
    paths = [folder / f'train-{number:05}.bin' for number in range(SHARDS)]
    for path in paths:
        write_shard(path, [[1, 2, 3]], tokenizer)
    began = time.perf_counter()
    tokens = Tokens([read_header(path, tokenizer) for path in paths])
    assert tokens[-1] == 3
    return time.perf_counter() - began


def main() -> None:
    """Prints the table; with --suite exits 1 where a level is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gigabytes', type=float, default=1.0)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--text', choices=('documents', 'line', 'solid'), default='documents')
    parser.add_argument('--suite', action='store_true', help='exit 1 where a level is missed')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get('TMPDIR')) as folder:
        folder = pathlib.Path(folder)
        path, size = folder / 'text.txt', int(arguments.gigabytes * 1e9)
        if arguments.text == 'documents':
            write_text(path, size)
        else:
            write_line(path, size, ' ' if arguments.text == 'line' else '')
        documents = 'whole' if arguments.text == 'line' else 'block'
        command = [sys.executable, '-m', 'gpt_jax.prepare', '--config=configs/base.py']
        command += [f'--config.data.path={path}', f'--config.data.documents={documents}']
        command += [f'--config.data.cache_dir={folder / "data"}', f'--num_workers={arguments.workers}']
        seconds, most = measure(command)
        (manifest,) = (folder / 'data').glob('*/manifest.json')
        tokens = sum(json.loads(manifest.read_text())['tokens'].values())
        opened = seconds_to_open(folder)
    rate = arguments.gigabytes * 1e3 / seconds
    print(f'{arguments.gigabytes} GB of text, {arguments.workers} workers: {tokens:,} tokens in {seconds:.0f} s')
    rows = [
        ('memory, all processes', f'{most / 1e9:.2f} GB', f'< {MEMORY_LEVEL / 1e9} GB', most < MEMORY_LEVEL),
        (f'opening {SHARDS} shards', f'{opened:.2f} s', f'< {OPEN_LEVEL} s', opened < OPEN_LEVEL),
    ]
    print(f'{"speed, tokenizer and shards":32} {rate:>6.1f} MB/s')
    for name, value, level, met in rows:
        print(f'{name:32} {value:>10}   level {level:8} {"met" if met else "MISSED"}')
    missed = [name for name, _, _, met in rows if not met]
    print(f'missed: {"; ".join(missed)}' if missed else 'all levels are met')
    sys.exit(1 if missed and arguments.suite else 0)


if __name__ == '__main__':
    main()
