"""Train a GPT.

    python -m gpt_jax.main --config=configs/quickstart.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

The same command again resumes where the run stopped. configs/base.py describes every key;
--config=configs/gpt3.py:1.3b passes a config its argument. Ctrl-C, SIGTERM and SIGHUP save and exit (130, 143, 129).
On several hosts the same command runs on each, with --distributed; jax finds the others by itself on TPU pods, SLURM
and the like, elsewhere name them with --coordinator, --num_processes and --process_id.
"""

import contextlib
import os

from absl import flags
from ml_collections import config_flags

from gpt_jax import cli
from gpt_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file('config', None, 'path to config file.')
WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run (default: runs/<config name>)')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, "one of several processes: start jax's distributed runtime")
COORDINATOR = flags.DEFINE_string('coordinator', None, 'with --distributed: HOST:PORT of process 0')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'with --distributed: how many processes there are')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'with --distributed: which of them this is, from 0')


def main() -> int:
    """Trains, and returns the exit status."""
    config = cli.read_experiment(CONFIG)
    flag = next((flag for flag in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if flag.value is not None), None)
    if flag is not None and not DISTRIBUTED.value:
        raise InputError(f'--{flag.name}={flag.value} is of one of several processes: add --distributed')
    if DISTRIBUTED.value and os.environ.get('TF_CPP_MIN_LOG_LEVEL') != '0':
        # What jaxlib prints of a lost process is a stack of C++. Before it is imported; where jax started this process,
        # it has set 1.
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '4'
    cli.use_compilation_cache()
    from gpt_jax.parallel import processes

    if DISTRIBUTED.value:
        processes.connect(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    from gpt_jax.inference import sample_text
    from gpt_jax.training import prefer_overrides, train

    prefer_overrides(config, config_flags.get_override_values(flags.FLAGS['config']))
    workdir = WORKDIR.value or f'runs/{cli.config_name()}'
    with processes.left_at_once() if DISTRIBUTED.value else contextlib.nullcontext():
        result = train(config, workdir, sample=sample_text)
    cli.discard_output()  # where nobody reads it any more: the run is well and ends well
    return 0 if result.signal is None else 128 + result.signal


if __name__ == '__main__':
    cli.run(main, __doc__, ('config', 'workdir', 'distributed', 'coordinator', 'num_processes', 'process_id'))
