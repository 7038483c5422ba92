"""The recipes of launch/: their scripts run with the cluster's own commands stood in for, and call what exists."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from gpt_jax.parallel.rendezvous import Place, find

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(path.name for path in LAUNCH.glob('*.sh'))
# Notes its arguments, and what it was told by the environment; ends with the statuses in STATUSES, one after another.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ['CALLS'], 'a+') as file:
    file.seek(0)
    calls = [json.loads(line)[0] for line in file].count(os.path.basename(sys.argv[0]))
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + chr(10))
if os.path.basename(sys.argv[0]) in ('srun', 'mpirun', '.venv/bin/python'):
    sys.exit(int(os.environ.get('STATUSES', '0').split(',')[calls]))
"""


@pytest.fixture
def call(tmp_path):
    """A function: a recipe and its arguments -> its exit status, and what it called with which arguments."""
    for name in ('srun', 'scontrol', 'gcloud', 'mpirun'):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(name, *arguments, script=None, **variables):
        environment = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'CALLS': str(tmp_path / 'calls')}
        text = (LAUNCH / name).read_text() if script is None else script
        command = ['bash', '-c', text, name, *arguments]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
        calls = (tmp_path / 'calls').read_text().splitlines() if (tmp_path / 'calls').exists() else []
        return done.returncode, [json.loads(line) for line in calls]

    return run


@pytest.fixture(scope='module')
def flags():
    """The names of main's flags."""
    command = [sys.executable, '-m', 'gpt_jax.main', '--help']
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r'^  --(\w+): ', printed, re.MULTILINE))


@pytest.mark.parametrize('name', sorted(path.name for path in LAUNCH.iterdir()))
def test_a_recipe_gives_flags_that_exist(name, flags):
    commands = re.findall(r'(?:gpt_jax\.main|set --)((?:[^;\n]|\n +--)*)', (LAUNCH / name).read_text())
    named = {flag for command in commands for flag in re.findall(r' --([a-z_]+)', command)}
    assert named <= flags
    assert 'distributed' in named or {'coordinator', 'num_processes', 'process_id'} <= named


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_can_be_parsed_and_run(name):
    subprocess.run(['bash', '-n', LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


# A minute is over where a run has taken one: the clock of the scripts begins an hour later.
def later(name):
    return 'SECONDS=3600\n' + (LAUNCH / name).read_text().replace('  SECONDS=0', '  SECONDS=3600')


@pytest.mark.parametrize(
    ('statuses', 'status', 'starts', 'requeued'),
    [('0', 0, 1, False), ('1,1,0', 0, 3, False), ('143', 143, 1, True), ('130', 130, 1, False)],
)
def test_slurm_starts_all_again_after_a_failure_and_queues_again_for_want_of_time(
    call, statuses, status, starts, requeued
):
    given = ('--config=a b.py', '--workdir=/shared')
    environment = {'STATUSES': statuses, 'SLURM_JOB_ID': '7'}
    ended, calls = call('slurm.sh', *given, script=later('slurm.sh'), **environment)
    assert ended == status
    runs = [arguments for command, *arguments in calls if command == 'srun']
    assert len(runs) == starts
    assert all(arguments[-2:] == list(given) and '--distributed' in arguments for arguments in runs)
    assert calls[starts:] == ([['scontrol', 'requeue', '7']] if requeued else [])


def test_slurm_does_not_repeat_a_mistake(call):
    ended, calls = call('slurm.sh', STATUSES='1,1', SLURM_JOB_ID='7')
    assert (ended, len(calls)) == (1, 1)
    ended, calls = call('slurm.sh', STATUSES='143,143,143', SLURM_JOB_ID='7')
    assert (ended, len(calls)) == (143, 2)


def test_slurm_gives_each_task_one_gpu_as_jax_expects(monkeypatch):
    options = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', (LAUNCH / 'slurm.sh').read_text(), re.MULTILINE))
    assert options['ntasks-per-node'] == options['gpus-per-node']
    assert not {'gpus-per-task', 'gpu-bind'} & options.keys()
    assert options['signal'] == 'TERM@300'
    tasks = int(options['nodes']) * int(options['ntasks-per-node'])
    of_task = {'SLURM_JOB_ID': '4096', 'SLURM_STEP_NODELIST': 'a[1-2]', 'SLURM_NTASKS': str(tasks)}
    of_task |= {'SLURM_PROCID': '9', 'SLURM_LOCALID': '1'}
    for name, value in of_task.items():
        monkeypatch.setenv(name, value)
    assert find(None, None, None) == Place('a1:61440', 16, 9, (1,))


def test_mpi_passes_both_kinds_of_flags_on(call):
    given = ['-n', '2', '--host', 'a,b'], ['--config=x y', '--workdir=/shared']
    ended, calls = call('mpi.sh', *given[0], '--', *given[1], script=later('mpi.sh'), STATUSES='1,0')
    assert ended == 0
    (_, *arguments), _ = calls
    assert arguments[:4] == given[0]
    assert arguments[-2:] == given[1]
    # What each rank runs, with a python that prints its arguments.
    own = [*arguments[4:], '--seed']
    own[2] = own[2].replace('exec python', 'printf "%s\\n"')
    assert own[:2] == ['bash', '-c']

    def printed(**variables):
        return subprocess.run(own, env=os.environ | variables, capture_output=True, text=True, check=True).stdout

    assert printed().splitlines() == ['-m', 'gpt_jax.main', '--distributed', *given[1], '--seed']
    ranks = {'COORDINATOR': 'a:1', 'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3'}
    three = ['--coordinator=a:1', '--num_processes=4', '--process_id=3']
    assert printed(**ranks).splitlines() == ['-m', 'gpt_jax.main', *three, *given[1], '--seed']
    assert call('mpi.sh', '-n', '2')[0] == 2


def test_tpu_vm_starts_the_same_loop_on_all_hosts(call, tmp_path):
    variables = {'TPU': 'my-v5p', 'ZONE': 'z', 'REPOSITORY': 'https://host/gpt_jax.git'}
    ended, calls = call('tpu_vm.sh', '--config=a b.py', '--workdir=gs://bucket/run', **variables)
    assert ended == 0
    assert [arguments[:-1] for arguments in calls] == [
        ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'my-v5p', '--zone=z', '--worker=all']
    ] * 2
    setup, run = (arguments[-1].removeprefix('--command=') for arguments in calls)
    assert 'git clone --branch=main https://host/gpt_jax.git gpt_jax' in setup
    # On a host: the loop, in the foreground, with a python that notes its arguments.
    command = run.partition('nohup setsid ')[2].partition(' >>run.log')[0]
    words = subprocess.run(['bash', '-c', f'printf "%s\\0" {command}'], capture_output=True, text=True, check=True)
    words = words.stdout.split('\0')[:-1]
    loop = words[2].replace('.venv/bin/python', 'srun')
    (tmp_path / 'calls').unlink()
    _, calls = call(*words[3:], script=loop, STATUSES='1')
    assert calls[0][-2:] == ['--config=a b.py', '--workdir=gs://bucket/run']
    assert '--distributed' in calls[0]
    assert call('tpu_vm.sh', TPU='my-v5p', ZONE='')[0] != 0


def test_the_jobset_is_one_run_that_starts_again_as_a_whole():
    jobset = yaml.safe_load((LAUNCH / 'kubernetes_jobset.yaml').read_text())
    assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    spec = jobset['spec']
    assert spec['network']['enableDNSHostnames']
    assert spec['network']['publishNotReadyAddresses']
    assert spec['failurePolicy']['maxRestarts'] > 0
    (replicated,) = spec['replicatedJobs']
    job = replicated['template']['spec']
    assert job['completionMode'] == 'Indexed'
    assert job['backoffLimit'] == 0
    pod = job['template']['spec']
    assert pod['restartPolicy'] == 'Never'
    assert pod['terminationGracePeriodSeconds'] >= 60
    (container,) = pod['containers']
    environment = {one['name']: one['value'] for one in container['env']}
    assert job['parallelism'] == job['completions'] == int(environment['NUM_PROCESSES'])
    # What a pod's shell hands to Python, and which process that is.
    script = container['args'][0].replace('exec python', 'printf "%s\\n"')
    variables = environment | {'JOB_COMPLETION_INDEX': '1'}
    printed = subprocess.run([*container['command'], script], env=variables, capture_output=True, text=True, check=True)
    given = dict(word.removeprefix('--').split('=', 1) for word in printed.stdout.splitlines() if '=' in word)
    first = f'{jobset["metadata"]["name"]}-{replicated["name"]}-0-0.{spec["network"]["subdomain"]}:1234'
    place = find(given['coordinator'], int(given['num_processes']), int(given['process_id']))
    assert place == Place(first, 2, 1)
