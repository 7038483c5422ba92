"""Time and memory of converting a Hugging Face directory to a checkpoint, and back.

    python benchmarks/convert.py [--preset=gpt2-small] [--suite]

Makes a directory of that size with random weights in a temporary folder and runs `python -m gpt_jax.convert` on it,
each way a process of its own. The time is that of the whole command. The memory is the process's peak (maximum resident
set), less that of a process that only imports what convert does; the peak itself stands beside it. Levels: <= 10 s, and
<= 2x the size of model.safetensors.
"""

import argparse
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

TIME_LEVEL, MEMORY_LEVEL = 10.0, 2.0
BASELINE = 'import jax, gpt_jax.checkpoints; jax.devices()'


def make_directory(preset: str, folder: pathlib.Path) -> None:
    """Writes the directory, in a process of its own: what this one takes would count as its children's peak."""
    import jax
    import numpy as np

    from gpt_jax.data.tokenizer import train_bpe
    from gpt_jax.models import huggingface, preset_config

    config, rng = preset_config(preset), np.random.default_rng(0)
    shapes = huggingface.parameter_shapes(config)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    huggingface.save(folder, config, params)
    train_bpe(['some text'], vocab_size=300).save(folder / 'tokenizer.json')


def run(*arguments: Any) -> tuple[float, int]:
    """Runs Python with these arguments: seconds, and bytes of its peak in memory."""
    began = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for it again
    if process.returncode:
        sys.exit(f'the command failed: {" ".join(command)}')
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def main() -> None:
    """Prints the table; with --suite exits 1 where a level is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', default='gpt2-small')
    parser.add_argument('--suite', action='store_true', help='exit 1 where a level is missed')
    arguments = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        maker = multiprocessing.get_context('spawn').Process(
            target=make_directory, args=(arguments.preset, folder / 'hf')
        )
        maker.start()
        maker.join()
        size = (folder / 'hf/model.safetensors').stat().st_size
        _, baseline = run('-c', BASELINE)
        print(f'{arguments.preset}: model.safetensors of {size / 1e6:,.0f} MB; imports take {baseline / 1e6:,.0f} MB')
        print(f'{"":32} {"seconds":>8} {"peak, MB":>10} {"above imports, x the file":>26}')
        for name, source, target in (
            ('Hugging Face -> checkpoint', 'hf', 'checkpoint'),
            ('checkpoint -> Hugging Face', 'checkpoint', 'back'),
        ):
            command = ('-m', 'gpt_jax.convert', f'--source={folder / source}', f'--target={folder / target}')
            seconds, peak = run(*command)
            ratio = (peak - baseline) / size
            print(f'{name:32} {seconds:>8.1f} {peak / 1e6:>10,.0f} {ratio:>25.2f}x')
            if seconds > TIME_LEVEL:
                missed.append(f'{name} in {TIME_LEVEL:.0f} s')
            if ratio > MEMORY_LEVEL:
                missed.append(f'{name} in {MEMORY_LEVEL:.0f}x the file')
        same = (folder / 'hf/model.safetensors').read_bytes() == (folder / 'back/model.safetensors').read_bytes()
    print('there and back gives the same file' if same else 'THERE AND BACK GIVES ANOTHER FILE')
    print(f'missed: {"; ".join(missed)}' if missed else 'all levels are met')
    sys.exit(1 if (missed or not same) and arguments.suite else 0)


if __name__ == '__main__':
    main()
