"""Whatever happens to a checkpoint's files, a run goes on from an older good one, or refuses in one line."""

import os
import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.checkpoints import Checkpoints, load, recover, verifying
from gpt_jax.errors import InputError


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2. Copied before it is changed."""
    workdir = tmp_path_factory.mktemp('saved') / 'run'
    with Checkpoints(workdir / 'checkpoints', keep_latest=2) as checkpoints:
        for step in (1, 2):
            params = {'w': jnp.full((64,), float(step))}
            checkpoints.save(step, params, {'mu': params}, {'name': f'step {step}'})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'run')


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def content(folder):
    """Every file and folder under `folder`, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')
    }


def delete(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b'\0')


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def make_a_folder(path):
    path.unlink()
    path.mkdir()


def make_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = (delete, cut, empty, lengthen, flip, make_a_folder, make_a_pipe)


@pytest.mark.parametrize('damage', DAMAGES)
def test_any_damage_of_any_file_of_the_newest_step_leads_to_the_one_before(saved, tmp_path, damage):
    for number, name in enumerate(names(saved / 'checkpoints' / '2')):
        path = saved / 'checkpoints' / '2' / name
        if path.stat().st_size == 0 and damage in (cut, empty, flip):
            continue
        folder = shutil.copytree(saved, tmp_path / str(number)) / 'checkpoints'
        damage(folder / '2' / name)
        before, whole, said = sorted((folder / '2').rglob('*')), content(folder / '1'), []
        assert recover(folder, said.append)['name'] == 'step 1', name
        assert len(said) == 1
        assert said[0].endswith(f'going on from step 1 instead; the damaged one is set aside as {folder / "damaged-2"}')
        assert '\n' not in said[0]
        # Nothing but a name has changed.
        assert sorted(path.name for path in folder.iterdir()) == ['1', 'damaged-2']
        assert [path.relative_to(folder / '2') for path in before] == [
            path.relative_to(folder / 'damaged-2') for path in sorted((folder / 'damaged-2').rglob('*'))
        ]
        assert content(folder / '1') == whole


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_a_byte_changed_put_in_or_taken_out_anywhere_gives_right_bits_or_those_of_the_step_before(saved, data):
    with tempfile.TemporaryDirectory() as place:
        workdir = shutil.copytree(saved, pathlib.Path(place, 'run'))
        step = workdir / 'checkpoints' / '2'
        path = step / data.draw(st.sampled_from([name for name in names(step) if (step / name).stat().st_size]))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(['flip', 'insert', 'remove', 'cut']))
        if change == 'flip':
            content[position] ^= 1 << data.draw(st.integers(0, 7))
        elif change == 'insert':
            content.insert(position, data.draw(st.integers(0, 255)))
        else:
            del content[position : position + 1 if change == 'remove' else None]
        path.write_bytes(content)
        loaded = load(workdir)
        assert loaded.params['w'].tolist() == [loaded.step] * 64
        said = []
        recovered = recover(workdir / 'checkpoints', said.append)['step']
        if path.name == verifying.NAME:
            # A blank more makes no other list; and a reader has no use for the optimizer's files.
            assert (loaded.step, recovered, len(said)) in ((1, 1, 1), (2, 1, 1), (2, 2, 0))
        else:
            assert loaded.step == (2 if path.is_relative_to(step / 'optimizer') else 1)
            assert recovered == 1
            assert str(path) in said[0]


@pytest.mark.parametrize('damage', DAMAGES)
def test_where_every_step_is_damaged_the_run_is_refused_in_one_line_and_nothing_changes(workdir, damage):
    folder = workdir / 'checkpoints'
    for step, name in (('1', 'params/_METADATA'), ('2', verifying.NAME)):
        damage(folder / step / name)
    before = sorted(folder.rglob('*'))
    with pytest.raises(InputError, match='there is no good checkpoint beside it') as error:
        recover(folder)
    assert str(folder / '2') in str(error.value)
    assert '\n' not in str(error.value)
    assert sorted(folder.rglob('*')) == before


def test_what_was_set_aside_is_not_overwritten_and_never_counted(workdir):
    folder = workdir / 'checkpoints'
    for number in range(3):
        (folder / '2' / verifying.NAME).unlink()
        if number < 2:  # and once without: a save sets aside, too
            assert recover(folder)['step'] == 1
            assert load(workdir).step == 1
        with Checkpoints(folder, keep_latest=5) as checkpoints:
            checkpoints.save(2, {'w': jnp.full((64,), 10.0 + number)}, None, {})
            checkpoints.wait()
            assert checkpoints.steps() == [1, 2]
    aside = [path.name for path in sorted(folder.glob('damaged-*'))]
    assert aside == ['damaged-2', 'damaged-2-2', 'damaged-2-3']
    assert load(workdir, step=2).params['w'][0] == 12


def test_a_folder_emptied_of_all_its_files_counts_as_damaged(workdir):
    shutil.rmtree(workdir / 'checkpoints' / '2')
    (workdir / 'checkpoints' / '2').mkdir()
    assert recover(workdir / 'checkpoints')['step'] == 1


def test_an_undamaged_newest_step_is_taken_and_older_damage_left_alone(workdir):
    (workdir / 'checkpoints' / '1' / verifying.NAME).unlink()
    before = content(workdir)
    said = []
    assert recover(workdir / 'checkpoints', said.append)['step'] == 2
    assert said == []
    assert content(workdir) == before


@pytest.mark.parametrize('make', [lambda path: path.write_text('mine'), lambda path: path.symlink_to('nowhere')])
def test_something_else_with_the_name_of_a_step_is_refused_before_any_work(workdir, make):
    make(workdir / 'checkpoints' / '7')
    with pytest.raises(InputError, match='checkpoints/7 is in the way and no checkpoint: move it elsewhere'):
        recover(workdir / 'checkpoints')


def test_a_new_run_has_nothing_to_recover(tmp_path):
    assert recover(tmp_path / 'checkpoints') is None
    (tmp_path / 'checkpoints').mkdir()
    for leftover in ('saving_1', 'saving_1.orbax-checkpoint-tmp', '3.removed', 'damaged-4'):
        (tmp_path / 'checkpoints' / leftover).mkdir()
    assert recover(tmp_path / 'checkpoints') is None
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='file cannot be used for checkpoints'):
        recover(tmp_path / 'file')


def test_a_link_is_followed_to_a_folder_of_checkpoints_alone(workdir, tmp_path):
    for name in ('storage', 'home'):
        (tmp_path / name).mkdir()
        (tmp_path / f'to {name}').symlink_to(tmp_path / name)
    (tmp_path / 'home' / 'thesis').touch()
    (tmp_path / 'to nowhere').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'to run').symlink_to(workdir / 'checkpoints')
    for leftover in ('saving_1', 'saving_1.orbax-checkpoint-tmp', '3.removed', 'damaged-4', 'damaged-4-2'):
        (workdir / 'checkpoints' / leftover).mkdir()
    assert recover(tmp_path / 'to storage') is None
    assert recover(tmp_path / 'to run')['step'] == 2
    with pytest.raises(
        InputError, match=r'to home leads to .*home, where other things are \(thesis\); remove the link'
    ):
        recover(tmp_path / 'to home')
    with pytest.raises(InputError, match=r'to nowhere leads to .*nowhere, where nothing is; make that folder'):
        recover(tmp_path / 'to nowhere')
    assert not (tmp_path / 'nowhere').exists()
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(InputError, match=r'loop is a link in a loop|loop leads to .*loop'):
        recover(tmp_path / 'loop')
