"""Running a verb: as a process of its own, or many times within this one."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def process(one_device):
    """A function: verb, arguments, standard input, folder -> the finished process, on one device."""

    def run(verb, *arguments, stdin='', cwd=ROOT):
        command = [sys.executable, '-m', f'gpt_jax.{verb}', *arguments]
        environment = os.environ | one_device | {'PYTHONPATH': str(ROOT)}
        return subprocess.run(
            command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture
def verb(monkeypatch, capfd):
    """A function: verb, arguments -> exit status, output and errors; in this process, on eight devices."""

    def run(name, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [name, *arguments])
        capfd.readouterr()
        try:
            runpy.run_module(f'gpt_jax.{name}', run_name='__main__')
        except SystemExit as exit_:
            status = exit_.code or 0
        finally:
            # Its own and the overrides of its experiment; libraries that it imported stay imported, with theirs.
            by_module = flags.FLAGS.flags_by_module_dict()
            for flag in {flag.name for module in (name, 'absl.flags._flag') for flag in by_module.get(module, ())}:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def refused(verb):
    """A function: verb, arguments -> its one line of error; checks that there is nothing else, and the status 1."""

    def run(name, *arguments):
        status, _, errors = verb(name, *arguments)
        assert status == 1
        assert re.fullmatch(r'error: .+\n', errors), errors
        return errors.removeprefix('error: ').removesuffix('\n')

    return run


@pytest.fixture(scope='session')
def experiment(corpus, tmp_path_factory):
    """A config file: the tiny experiment, as a user would write it."""
    folder = tmp_path_factory.mktemp('experiment')
    path = folder / 'sentences.py'
    path.write_text(
        f"""
from gpt_jax.config import base


def get_config():
    config = base()
    config.model.update(block_size=32, n_layer=2, n_head=2, d_model=32, dropout=0.1)
    config.data.update(path={str(corpus)!r}, tokenizer='char', cache_dir={str(folder / 'cache')!r})
    config.optimizer.learning_rate = 1e-2
    config.schedule.update(warmup_steps=2, final_fraction=0.1)
    config.train.update(epochs=1.0, batch_size=16, log_every_steps=1)
    config.eval.update(every_steps=3, batch_size=16)
    config.checkpoint.every_steps = 3
    config.preview.update(every_steps=3, max_new_tokens=8, prompt='the ')
    return config
""",
        encoding='utf-8',
    )
    return path
