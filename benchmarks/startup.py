"""From the command to the first step, and what the loader costs beside a step.

    python benchmarks/startup.py [--config=configs/quickstart.py] [--suite]

Cold: every cache is empty, so corpus, tokenizer, shards and all programs are made. Warm: the same command in a new
workdir. The loader's share is the median time of a batch over the median time of a step, of which it is hidden behind
all but the first. Levels: cold <= 30 s, warm <= 8 s, loader < 1 % of a step.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from gpt_jax.data import Batches, Tokens, read_header

COLD_LEVEL, WARM_LEVEL, LOADER_LEVEL = 30.0, 8.0, 0.01
STEPS = 40


def seconds_to_first_step(config: str, workdir: pathlib.Path, cache: pathlib.Path) -> float:
    """Runs the command to its end and returns the seconds until it reported step 1."""
    command = [sys.executable, '-m', 'gpt_jax.main', f'--config={config}', f'--workdir={workdir}']
    command += [f'--config.train.steps={STEPS}', '--config.train.log_every_steps=1', '--config.schedule.warmup_steps=1']
    environment = os.environ | {'XDG_CACHE_HOME': str(cache)}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    began, first = time.perf_counter(), None
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if first is None and line.startswith('step 1/'):
                first = time.perf_counter() - began
    if process.returncode or first is None:
        sys.exit(f'the command failed: {" ".join(command)}')
    return first


def step_seconds(workdir: pathlib.Path) -> float:
    """Median seconds of a step, from the run's own log."""
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    rows = [row for row in rows if 'loss' in row][5:]
    return statistics.median(rows[0]['tokens'] / rows[0]['step'] / row['tokens_per_second'] for row in rows)


def batch_seconds(workdir: pathlib.Path, cache: pathlib.Path) -> float:
    """Median seconds to make one batch of the run's size from its shards."""
    config = json.loads((workdir / 'config.json').read_text())
    (shard,) = cache.glob('gpt_jax/data/*/train-00000.bin')
    tokens = Tokens([read_header(shard)])
    batches = Batches(tokens, config['train']['batch_size'], config['model']['block_size'], seed=0)
    times = []
    for step in range(200):
        began = time.perf_counter()
        np.asarray(batches.rows(step)['tokens'])
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Prints the table; with --suite exits 1 where a level is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='configs/quickstart.py')
    parser.add_argument('--suite', action='store_true', help='exit 1 where a level is missed')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = pathlib.Path(folder, 'cache')
        cold = seconds_to_first_step(arguments.config, pathlib.Path(folder, 'cold'), cache)
        warm = seconds_to_first_step(arguments.config, pathlib.Path(folder, 'warm'), cache)
        share = batch_seconds(pathlib.Path(folder, 'warm'), cache) / step_seconds(pathlib.Path(folder, 'warm'))
    rows = [
        ('cold start to the first step', f'{cold:.1f} s', f'<= {COLD_LEVEL:.0f} s', cold <= COLD_LEVEL),
        ('warm start to the first step', f'{warm:.1f} s', f'<= {WARM_LEVEL:.0f} s', warm <= WARM_LEVEL),
        ('a batch, as a share of a step', f'{share:.2%}', f'< {LOADER_LEVEL:.0%}', share < LOADER_LEVEL),
    ]
    for name, value, level, met in rows:
        print(f'{name:32} {value:>8}   level {level:8} {"met" if met else "MISSED"}')
    missed = [name for name, _, _, met in rows if not met]
    print(f'missed: {"; ".join(missed)}' if missed else 'all levels are met')
    sys.exit(1 if missed and arguments.suite else 0)


if __name__ == '__main__':
    main()
