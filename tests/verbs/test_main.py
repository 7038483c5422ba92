import hashlib
import json
import pathlib
import subprocess
import sys

import grain  # noqa: F401 - its flags are not the verb's, which are taken away again after each test
import pytest

from gpt_jax.config import help_text

ROOT = pathlib.Path(__file__).resolve().parents[2]


def snapshot(folder):
    """Of every file its time of change and a hash."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


@pytest.fixture
def config(experiment):
    return f'--config={experiment}'


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpfull'])
def test_help_names_the_flags_and_exits_0(process, flag):
    result = process('main', '--config=missing.py', flag)
    assert (result.returncode, result.stderr) == (0, '')
    for text in ('python -m gpt_jax.main --config=', '--workdir: ', '--distributed: ', '--config: the experiment'):
        assert text in result.stdout


def test_help_config_prints_every_key_of_an_experiment(process, config):
    for arguments in ([config], []):
        result = process('main', *arguments, '--help_config')
        assert (result.returncode, result.stderr) == (0, '')
        assert result.stdout == help_text() + '\n'


def test_help_that_nobody_reads_to_its_end_says_nothing():
    command = [sys.executable, '-m', 'gpt_jax.main', '--help_config']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 141


@pytest.mark.slow
def test_an_experiment_may_lie_anywhere_and_be_run_from_anywhere(process, experiment, tmp_path):
    result = process('main', f'--config={experiment.name}', '--config.train.stepz=3', cwd=experiment.parent)
    assert result.stderr == 'error: --config.train.stepz: there is no such key; did you mean steps?\n'
    arguments = ('--config.train.steps=3', '--config.preview.every_steps=0', f'--workdir={tmp_path / "run"}')
    result = process('main', f'--config={experiment.name}', *arguments, cwd=experiment.parent)
    assert (result.returncode, result.stderr) == (0, '')
    assert (tmp_path / 'run' / 'checkpoints' / '3').is_dir()


def test_print_sharding_prints_a_table_and_trains_nothing(verb, config, tmp_path):
    mesh = ('--config.mesh.data=1', '--config.mesh.fsdp=4', '--config.mesh.tensor=2')
    status, output, _ = verb('main', config, '--print_sharding', f'--workdir={tmp_path / "run"}', *mesh)
    assert status in (0, None)
    assert output.startswith('8 cpu device(s): mesh.data=1, mesh.fsdp=4, mesh.tensor=2, mesh.context=1\n')
    for name in ('wte', 'step', 'tokens', 'residual stream'):
        assert f'\n{name} ' in output
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (['--config.mesh.data=3'], 'mesh.data=3, mesh.fsdp=1, mesh.tensor=1, mesh.context=1 does not divide the 8'),
        (['--config.mesh.tensor=8'], 'model.n_head=2 is not divisible by mesh.tensor=8'),
        (['--config.mesh.context=8', '--config.model.block_size=24'], 'model.block_size=24 is not divisible by 2 x'),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line_before_anything_is_printed(refused, config, changes, message):
    assert message in refused('main', config, '--print_sharding', *changes)


def test_a_run_from_the_command_line_exits_0_and_says_how_to_go_on(verb, config, tmp_path):
    status, output, _ = verb('main', config, f'--workdir={tmp_path}', '--config.train.steps=3')
    assert status == 0
    assert f'python -m gpt_jax.generate --checkpoint={tmp_path}' in output
    assert 'sample:\nthe ' in output
    assert ' device(s); attention: full\n' in output  # no other kernel has dropout
    assert (tmp_path / 'checkpoints' / '3').is_dir()
    # Steps on the command line replaced the epochs of the file.
    recorded = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    assert (recorded['train']['steps'], recorded['train']['epochs']) == (3, None)
    before = snapshot(tmp_path)
    status, output, _ = verb('main', config, f'--workdir={tmp_path}', '--config.train.steps=3')
    assert status == 0
    assert 'finished already, at step 3' in output
    assert snapshot(tmp_path) == before


def test_the_workdir_is_by_default_named_after_the_config(verb, config, monkeypatch, tmp_path):
    import gpt_jax.training

    workdirs = []

    def train(config, workdir, *_):
        workdirs.append(workdir)
        raise gpt_jax.errors.InputError('enough')

    monkeypatch.setattr(gpt_jax.training, 'train', train)
    verb('main', config)
    verb('main', '--config=configs/gpt3.py:1.3b')
    verb('main', '--config=configs/smoke.py', f'--workdir={tmp_path}')
    assert workdirs == ['runs/sentences', 'runs/gpt3-1.3b', str(tmp_path)]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--config is missing; try --config=configs/quickstart.py'),
        (['--config=configs/missing.py'], '--config=configs/missing.py cannot be read (No such file'),
        (['--config=configs/gpt3.py:4b'], "there is no size '4b'"),
        (['--confg=configs/smoke.py'], "Unknown command line flag 'confg'"),
        (['CONFIG', 'extra'], "unexpected argument 'extra'"),
        (['CONFIG', '--config.train.stepz=3'], '--config.train.stepz: there is no such key; did you mean steps?'),
        (['CONFIG', '--config.trian.steps=3'], '--config.trian.steps: there is no such key'),
        (['CONFIG', '--config.train.steps=three'], 'three'),
        (['CONFIG', '--config.train.steps=1.5'], '1.5'),
        (['CONFIG', '--num_processes=many'], 'many'),
        (['CONFIG', '--num_processes=2'], 'nothing here tells jax --coordinator and --process_id; give'),
        (['CONFIG', '--process_id=0'], 'nothing here tells jax --coordinator and --num_processes; give'),
        (['CONFIG', '--coordinator=a:1'], 'nothing here tells jax --num_processes and --process_id; give'),
        (['CONFIG', '--distributed', '--num_processes=0'], '--num_processes=0 must be at least 1'),
        (['CONFIG', '--config.model.d_model=33'], 'model.d_model=33 is not divisible by model.n_head=2'),
        (['CONFIG', '--config.train.batch_size=12'], 'train.batch_size=12 in 1 micro-batches of 12 is not divisible'),
        (['CONFIG', '--config.train.accumulation_steps=3'], 'is not divisible by train.accumulation_steps=3'),
        (['CONFIG', '--config.mesh.fsdp=16'], 'mesh.fsdp=16'),
        (['CONFIG', '--config.train.steps=3', '--config.train.tokens=9'], 'only one of them may be set'),
        (['CONFIG', '--config.data.path=missing.txt'], 'data.path=missing.txt: no such file'),
        (['CONFIG', '--config.data.tokenizer=words'], 'data.tokenizer=words'),
        (['CONFIG', '--config.data.corpus=books'], 'data.corpus=books: unknown'),
        (['CONFIG', '--config.train.init_from=none'], 'train.init_from=none: checkpoint none does not exist'),
        (['CONFIG', '--config.checkpoint.restore_from=none'], 'checkpoint.restore_from=none: checkpoint none does not'),
        (['CONFIG', '--config.checkpoint.restore_items=params'], 'checkpoint.restore_items=params: of which run?'),
        (['--config=configs/finetune_gpt2.py'], 'train.init_from=gpt2-xl: checkpoint gpt2-xl does not exist'),
        (['CONFIG', '--config.precision.compute=f64'], "precision.compute='f64' must be one of"),
        (['CONFIG', '--config.preview.temperature=0.0'], 'preview.temperature=0.0 must be above 0'),
    ],
)
def test_what_cannot_be_is_one_line_and_status_1(refused, config, tmp_path, arguments, message):
    arguments = [config if argument == 'CONFIG' else argument for argument in arguments]
    assert message in refused('main', f'--workdir={tmp_path / "run"}', *arguments)


def test_an_empty_corpus_is_named(refused, config, tmp_path):
    (tmp_path / 'empty.txt').touch()
    message = refused('main', config, f'--config.data.path={tmp_path / "empty.txt"}', f'--workdir={tmp_path / "run"}')
    assert 'the file is empty' in message


def test_a_workdir_that_is_a_file_is_named(refused, config, tmp_path):
    (tmp_path / 'file').touch()
    assert 'is a file; name a folder' in refused('main', config, f'--workdir={tmp_path / "file"}')


def test_the_workdir_of_another_config_is_refused_by_key_and_left_alone(refused, config, finished_run):
    before = snapshot(finished_run.workdir)
    message = refused('main', config, f'--workdir={finished_run.workdir}', '--config.optimizer.beta1=0.5')
    assert 'optimizer.beta1: 0.9 -> 0.5' in message
    assert snapshot(finished_run.workdir) == before


def test_a_real_process_exits_1_with_one_line(process, config, tmp_path):
    result = process('main', config, '--config.model.d_model=33', f'--workdir={tmp_path}')
    assert result.returncode == 1
    assert result.stderr.startswith('error: model.d_model=33')
    assert result.stderr.count('\n') == 1
