"""Train a GPT.

    python -m gpt_jax.main --config=configs/quickstart.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

The same command again resumes where the run stopped. configs/base.py describes every key;
--config=configs/gpt3.py:1.3b passes a config its argument. Ctrl-C, SIGTERM and SIGHUP save and exit (130, 143, 129).
On several hosts the same command runs on each: with --distributed where jax finds the others by itself (Slurm, Open
MPI, Kubernetes, TPU pods), elsewhere with --coordinator, --num_processes and --process_id. launch/ has recipes.
With --print_sharding it prints how every array lies on the devices, and trains nothing.
"""

import contextlib
import os
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from gpt_jax import cli

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG = config_flags.DEFINE_config_file('config', None, 'path to config file.')
WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run (default: runs/<config name>)')
PRINT_SHARDING = flags.DEFINE_bool(
    'print_sharding', False, 'print how every array lies on the devices, and its bytes on each; nothing is trained'
)
PROFILE = flags.DEFINE_string('profile', None, 'START:STOP, the steps to trace into WORKDIR/profile')
DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'one of several processes, as jax finds them on a cluster')
COORDINATOR = flags.DEFINE_string('coordinator', None, 'one of several processes: HOST:PORT of process 0')
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'one of several processes: how many there are')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'one of several processes: which of them this is, from 0')
CONNECT_SECONDS = flags.DEFINE_float(
    'connect_seconds', 60.0, 'one of several processes: how long it waits for all to come', lower_bound=1.0
)


def main() -> int:
    """Trains, and returns the exit status."""
    config = cli.read_experiment(CONFIG)
    named = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    one_of_several = DISTRIBUTED.value or named != (None, None, None)
    if one_of_several and os.environ.get('TF_CPP_MIN_LOG_LEVEL') != '0':
        # What jaxlib prints of a lost process is a stack of C++. Before it is imported; where jax started this process,
        # it has set 1.
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '4'
    cli.use_compilation_cache()
    from gpt_jax.parallel import processes
    from gpt_jax.training.tracing import parse_steps

    profile = None if PROFILE.value is None else parse_steps(PROFILE.value)
    if one_of_several:
        processes.connect(*named, CONNECT_SECONDS.value)
    from gpt_jax.inference import sample_text
    from gpt_jax.training import prefer_overrides, train

    prefer_overrides(config, config_flags.get_override_values(flags.FLAGS['config']))
    if PRINT_SHARDING.value:
        _print_sharding(config)
        return 0
    workdir = WORKDIR.value or f'runs/{cli.config_name()}'
    with processes.left_at_once() if one_of_several else contextlib.nullcontext():
        result = train(config, workdir, sample_text, profile)
    cli.discard_output()  # where nobody reads it any more: the run is well and ends well
    return 0 if result.signal is None else 128 + result.signal


def _print_sharding(config: 'ConfigDict') -> None:
    """Prints the partition of every array of a run; of several processes the first one does."""
    import jax

    from gpt_jax.parallel import make_mesh
    from gpt_jax.training import resolve
    from gpt_jax.training.layout import layout, render
    from gpt_jax.training.recipe import planned_model
    from gpt_jax.training.step import check_mesh

    run = resolve(config)
    model, mesh = planned_model(run), make_mesh(run.mesh)
    check_mesh(run, mesh.shape, model)
    if jax.process_index() == 0:
        print(render(layout(run, model, mesh), mesh))


if __name__ == '__main__':
    of_processes = ('distributed', 'coordinator', 'num_processes', 'process_id', 'connect_seconds')
    cli.run(main, __doc__, ('config', 'workdir', 'print_sharding', 'profile', *of_processes))
