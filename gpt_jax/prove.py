"""Prove that a run of yours survives: kill it again and again, and compare what is left with the same run left alone.

    python -m gpt_jax.prove --config=configs/smoke.py [--kills=20] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

The run is trained to its end once. Then it is trained again, and on the way sent SIGKILL, SIGTERM and SIGINT at random
moments, many of them while it saves, and started again each time. At the end every bit of the parameters and of the
optimizer's state, the rows of metrics.jsonl (but for what a clock measured) and the previews must be the same. It exits
with 0 where they are, and with 1 where anything differs. Take a short run: every kill costs a start of the program.
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from gpt_jax import cli
from gpt_jax.errors import InputError
from gpt_jax.files import check_local

CONFIG = config_flags.DEFINE_config_file('config', None, 'path to config file.')
WORKDIR = flags.DEFINE_string('workdir', None, 'new folder for the runs (default: runs/prove-<config name>)')
KILLS = flags.DEFINE_integer('kills', 20, 'how many times the run is killed')
SEED = flags.DEFINE_integer('seed', 0, 'of the moments')


def main() -> int:
    """Kills, compares, and returns the exit status."""
    config = cli.read_experiment(CONFIG)
    if not 1 <= KILLS.value <= 100_000:
        raise InputError(f'--kills={KILLS.value} must be at least 1 and at most 100000')
    workdir = WORKDIR.value or f'runs/prove-{cli.config_name()}'
    check_local(workdir, f'--workdir={workdir}')
    import jax

    jax.config.update('jax_platforms', 'cpu')  # this process only compares; devices are for the run
    from gpt_jax.config import parse
    from gpt_jax.training import prefer_overrides
    from gpt_jax.training.campaign import campaign

    prefer_overrides(config, config_flags.get_override_values(flags.FLAGS['config']))
    command = [sys.executable, '-m', 'gpt_jax.main', *_for_the_run(sys.argv[1:])]
    report = campaign(command, parse(config), pathlib.Path(workdir).expanduser().absolute(), KILLS.value, SEED.value)
    print(f'\n{report.table()}\n')
    if not report.proven:
        print('\n'.join(report.differences))
        raise InputError(
            f'{len(report.kills)} kills, {len(report.differences)} finding(s) above; the runs are in {workdir}'
        )
    print(
        f'proven: {len(report.kills)} kills of {report.runs} run(s) left the bits of an undisturbed one: '
        f'{report.arrays} arrays of {report.values:,} numbers, {report.rows} rows of metrics.jsonl, and samples.txt'
    )
    return 0


def _for_the_run(arguments: list[str]) -> list[str]:
    """The flags that are not this verb's own."""
    own = {flag for flag in cli.own_flags() if flag != 'config'}
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip('-').partition('=')
        if skip or name in own:
            skip = not skip and not equals  # its value is the next argument
        else:
            kept.append(argument)
    return kept


if __name__ == '__main__':
    cli.run(main, __doc__, ('config', 'workdir', 'kills', 'seed'))
