import os
import re

import pytest


def test_help_names_the_flags_and_exits_0(verb):
    status, output, errors = verb('prove', '--help')
    assert (status, errors) == (0, '')
    for text in ('python -m gpt_jax.prove --config=', '--kills: ', '--workdir: ', '--seed: '):
        assert text in output


def test_what_cannot_be_is_refused_before_anything_is_trained(refused, experiment, tmp_path):
    assert refused('prove') == '--config is missing; try --config=configs/quickstart.py'
    assert refused('prove', f'--config={experiment}', '--kills=0').startswith('--kills=0 must be at least 1')
    (tmp_path / 'file').write_text('')
    message = refused('prove', f'--config={experiment}', f'--workdir={tmp_path}')
    assert message == f'--workdir={tmp_path} is not empty; name a new folder, or remove it'


def test_a_run_that_fails_by_itself_says_why(refused, experiment, tmp_path):
    message = refused('prove', f'--config={experiment}', f'--workdir={tmp_path}/p', '--config.data.path=nowhere.txt')
    assert re.search(r'ended by itself with status 1: .*nowhere\.txt', message)


@pytest.mark.slow
def test_a_run_of_ones_own_is_proven(verb, experiment, tmp_path):
    workdir = os.path.relpath(tmp_path / 'p')  # as its default is
    arguments = (f'--workdir={workdir}', '--kills', '2', '--config.train.steps=8')
    status, output, errors = verb('prove', f'--config={experiment}', *arguments)
    assert (status, errors) == (0, '')
    assert re.search(r'^2/2: SIGTERM after ', output, re.MULTILINE)
    assert re.search(r'^in all +1 +1 +0 +2$', output, re.MULTILINE)
    assert re.search(r'^proven: 2 kills of \d run\(s\) left the bits of an undisturbed one: \d+ arrays', output, re.M)
