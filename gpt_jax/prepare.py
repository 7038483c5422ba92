"""Prepare data: corpus -> tokenizer -> token shards, as training does by itself where they are missing.

    python -m gpt_jax.prepare --config=configs/gpt2_small.py [--num_workers=N] [--piece=3/16]
    python -m gpt_jax.prepare --inspect=DIR

The same command again goes on where it was stopped, and several at once share the work. With --piece=3/16 this machine
does the third of sixteen shares; where the machines share no folder, copy all files into one and run any piece again.
--inspect looks at prepared data and verifies it; it exits with 1 where a file is damaged.
"""

import dataclasses
import re

from absl import flags
from ml_collections import config_flags

from gpt_jax import cli
from gpt_jax.config import parse
from gpt_jax.errors import InputError, printable

CONFIG = config_flags.DEFINE_config_file('config', None, 'path to config file.')
NUM_WORKERS = flags.DEFINE_integer('num_workers', None, 'processes that tokenise (default: data.num_workers)')
PIECE = flags.DEFINE_string('piece', None, 'I/N: the share of this machine, from 1/N to N/N')
INSPECT = flags.DEFINE_string('inspect', None, 'folder of prepared data to look at and verify, instead of preparing')


def main() -> int:
    """Prepares or inspects, and returns the exit status."""
    if INSPECT.value is not None:
        from gpt_jax.data.shards import inspect
        from gpt_jax.data.shared import local_folder

        for line in inspect(local_folder(INSPECT.value, f'--inspect={INSPECT.value}', print)):
            print(line)
        return 0
    run, tokenizer = parse(cli.read_experiment(CONFIG)), None
    settings = dataclasses.asdict(run.data)
    if (run.train.init_from, run.checkpoint.restore_from) != (None, None):
        from gpt_jax.training.recipe import find_beginning

        tokenizer = find_beginning(run).tokenizer
        settings['tokenizer'] = settings['tokenizer'] or tokenizer.kind
    if NUM_WORKERS.value is not None:
        settings['num_workers'] = NUM_WORKERS.value
    piece = _piece(PIECE.value)
    from gpt_jax.data import DataConfig, prepare

    given = {key: value for key, value in settings.items() if value is not None}
    data = prepare(DataConfig(**given), tokenizer, piece=piece)
    for source in data.prepared.values() if data is not None else ():
        print(f'done: {source.folder}')
    return 0


def _piece(text: str | None) -> tuple[int, int]:
    """'3/16' -> (3, 16)."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r'([0-9]{1,9})/([0-9]{1,9})', text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f'--piece={printable(text, 60)}: write I/N with I from 1 to N, such as --piece=3/16')
    return int(match[1]), int(match[2])


if __name__ == '__main__':
    cli.run(main, __doc__, ('config', 'num_workers', 'piece', 'inspect'))
