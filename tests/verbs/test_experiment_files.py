"""What --config names: files that are none, experiments whose own code fails, keys that are unset."""

import os
import sys

import pytest

BASE = 'from gpt_jax.config import base\ndef get_config():\n    c = base()\n'


@pytest.fixture(autouse=True)
def new_module(monkeypatch):
    """A process reads one experiment: what another one has defined is not there."""
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)


@pytest.mark.parametrize(
    ('code', 'message'),
    [
        ('', 'defines no get_config()'),
        ('get_config = 5\n', 'TypeError: '),
        ('def get_config():\n    return None\n', 'must return a ConfigDict, not NoneType'),
        ('def get_config():\n    return {"model": {}}\n', 'must return a ConfigDict, not dict'),
        ('def get_config():\n    return 5\n', 'must return a ConfigDict, not int'),
        ('def get_config(:\n', 'line 1: SyntaxError: invalid syntax'),
        ('import nosuchmodule\n', "line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ('def get_config():\n    return 1 / 0\n', 'line 2: ZeroDivisionError: division by zero'),
        ('def get_config():\n    return {}["a"]\n', "line 2: KeyError: 'a'"),
        ('def get_config():\n    raise ValueError("bad\\nnews")\n', 'line 2: ValueError: bad'),
        ('def get_config():\n    open("/nowhere/x")\n', 'line 2: FileNotFoundError: '),
        ('def get_config():\n    return get_config()\n', 'line 2: RecursionError: '),
        ('def get_config():\n    import sys\n    sys.exit(3)\n', 'line 3: SystemExit: 3'),
        ('def get_config(size):\n    return size\n', 'TypeError: get_config() missing 1 required'),
        (f'{BASE}    c.train.steps = "x"\n    return c\n', 'line 4: TypeError: '),
        (f'{BASE}    c.train.stepz = 1\n    return c\n', 'train.stepz is not a key of an experiment'),
        (f'{BASE}    c.train.seed = -1\n    return c\n', 'train.seed=-1 must be at least 0 and below 4294967296'),
        ('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n', 'Git LFS pointer'),
    ],
)
@pytest.mark.parametrize('name', ['main', 'plan', 'prepare'])
def test_an_experiment_that_fails_is_one_line_with_file_and_line(refused, tmp_path, name, code, message):
    path = tmp_path / 'experiment.py'
    path.write_text(code, encoding='utf-8')
    told = refused(name, f'--config={path}', *([f'--workdir={tmp_path / "run"}'] if name == 'main' else []))
    assert message in told
    assert str(path) in told or 'train.' in told
    assert not (tmp_path / 'run').exists()


def make_folder(path):
    path.mkdir()


@pytest.mark.parametrize(
    ('make', 'message'),
    [(os.mkfifo, 'is a named pipe'), (make_folder, 'is a folder'), (lambda _: None, 'cannot be read (No such file')],
)
def test_what_is_no_file_is_one_line(refused, tmp_path, make, message):
    path = tmp_path / 'experiment.py'
    make(path)
    for name in ('main', 'plan', 'prepare'):
        assert f'--config={path} {message}' in refused(name, f'--config={path}')
        assert f'--config={path} {message}' in refused(name, '--config', str(path))


def test_none_unsets_a_key(verb, refused, experiment):
    config = f'--config={experiment}'
    assert 'the length of the run is unset' in refused('plan', config, '--config.train.epochs=None')
    status, _, _ = verb('plan', config, '--config.schedule.final_fraction=None', '--config.data.path=None')
    assert status == 0
    told = refused('plan', config, '--config.train.log_every_steps=None')
    assert told == 'train.log_every_steps=None must be a whole number'
    assert 'did you mean steps?' in refused('plan', config, '--config.train.stepz=None')
