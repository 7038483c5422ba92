"""Links that somebody has planted in a workdir lead no writer out of it; and any name of one will do."""

import os
import pathlib
import shlex

import pytest

from gpt_jax.checkpoints import load
from gpt_jax.errors import InputError
from gpt_jax.training import train

NAME = "runs [1] #2 'it''s' $HOME *?\nnaïve; \"x\""
# What earlier releases, or anybody, might take for the name of a temporary file.
TEMPORARY = ('{}.tmp', '.{}.tmp', '{}~', '.{}.swp', 'metrics.tmp')


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


@pytest.mark.parametrize('dangling', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_writes_through_no_link_of_any_name_that_it_uses(tiny_config, finished_run, tmp_path, dangling, capfd):
    workdir, victims = tmp_path / NAME, tmp_path / 'victims'
    workdir.mkdir()
    victims.mkdir()
    names = [path.name for path in finished_run.workdir.iterdir() if path.is_file()]
    assert {'config.json', 'tokenizer.json', 'metrics.jsonl', 'samples.txt', 'loss.png'} <= set(names)
    text = {'config.json': '{}', 'metrics.jsonl': '', 'samples.txt': ''}  # what a run may read first
    for name in names:
        if name in ('config.json', 'tokenizer.json') and not dangling:
            continue  # these would be read, and refused
        for form in ('{}', *TEMPORARY):
            victim = victims / form.format(name)
            if not dangling:
                victim.write_text(text.get(name, 'precious'))
            if not os.path.lexists(workdir / victim.name):
                (workdir / victim.name).symlink_to(victim)
    (victims / 'folder').mkdir()
    (victims / 'folder' / 'precious').write_text('mine')
    (workdir / 'tensorboard').symlink_to(victims / 'folder')
    (workdir / 'checkpoints').mkdir()
    for name in ('saving_3', 'saving_3.orbax-checkpoint-tmp', '3.removed', '3.orbax-checkpoint-tmp'):
        (workdir / 'checkpoints' / name).symlink_to(victims / 'folder')
    before = tree(victims)
    train(tiny_config(), workdir)
    assert tree(victims) == before
    assert not any((workdir / name).is_symlink() for name in (*names, 'tensorboard'))
    assert [path.name for path in (workdir / 'checkpoints').iterdir()] == ['6']
    # The command that it prints can be pasted.
    said = capfd.readouterr().out
    command = shlex.split(said[said.index('python -m gpt_jax.generate') :])
    assert command[3] == f'--checkpoint={workdir}'
    assert load(command[3].removeprefix('--checkpoint=')).step == 6


def test_a_lock_that_is_a_link_is_refused(tiny_config, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'victim').write_text('precious')
    (tmp_path / 'run' / '.lock').symlink_to(tmp_path / 'victim')
    with pytest.raises(InputError, match='cannot be written to'):
        train(tiny_config(), tmp_path / 'run')
    assert (tmp_path / 'victim').read_text() == 'precious'


@pytest.mark.slow
def test_checkpoints_may_be_linked_to_storage_for_them_and_to_nothing_else(tiny_config, finished_run, tmp_path):
    for name in ('storage', 'home'):
        (tmp_path / name).mkdir()
    (tmp_path / 'home' / 'thesis').touch()
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'checkpoints').symlink_to(tmp_path / 'home')
    with pytest.raises(InputError, match=r'checkpoints leads to .*home, where other things are \(thesis\)'):
        train(tiny_config(), tmp_path / 'run')
    assert [path.name for path in (tmp_path / 'home').iterdir()] == ['thesis']
    (tmp_path / 'run' / 'checkpoints').unlink()
    (tmp_path / 'run' / 'checkpoints').symlink_to(tmp_path / 'storage')
    assert train(tiny_config(), tmp_path / 'run').step == 6
    assert [path.name for path in (tmp_path / 'storage').iterdir()] == ['6']
    assert pathlib.Path(tmp_path / 'run' / 'checkpoints').is_symlink()
    assert load(tmp_path / 'run').step == load(finished_run.workdir).step
