"""A workdir may have any name that the system lets a folder have."""

import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_jax.checkpoints import Checkpoints, import_huggingface, load, recover, resolve

# All that is not the end of a path, nor a half of a pair that UTF-8 cannot have.
LETTERS = st.characters(exclude_characters='/\0', exclude_categories=('Cs',))
NAMES = st.text(st.one_of(st.sampled_from('[]*?#$ \'"\\\n!{}%~&;:-.'), LETTERS), min_size=1, max_size=20)


def is_legal(name):
    return name not in ('.', '..') and len(name.encode()) < 200


@settings(max_examples=20, deadline=None, derandomize=True)
@example('[1]')
@example('*')
@example('a\\b')
@example("it's #1 $HOME\n'")
@example('ü' * 90)
@given(NAMES.filter(is_legal))
def test_what_is_saved_in_a_folder_of_any_name_is_found_and_read(name):
    with tempfile.TemporaryDirectory() as place:
        workdir = pathlib.Path(place, name)
        with Checkpoints(workdir / 'checkpoints') as checkpoints:
            checkpoints.save(1, {'w': jnp.arange(3.0)}, None, {})
        assert recover(workdir / 'checkpoints')['step'] == 1
        found = resolve(workdir)
        assert found.folder == workdir.resolve() / 'checkpoints' / '1'
        assert load(found).params['w'].tolist() == [0, 1, 2]
        assert load(found.folder).step == 1


def test_a_name_with_a_pattern_never_stands_for_a_sibling(tmp_path):
    for number, name in enumerate(('run1', 'run2', 'run?', 'run*', 'run[12]')):
        with Checkpoints(tmp_path / name / 'checkpoints') as checkpoints:
            checkpoints.save(1, {'w': jnp.full(3, number)}, None, {})
    assert load(tmp_path / 'run?').params['w'].tolist() == [2, 2, 2]
    assert load(tmp_path / 'run*').params['w'].tolist() == [3, 3, 3]
    assert load(tmp_path / 'run[12]').params['w'].tolist() == [4, 4, 4]


@pytest.mark.parametrize('name', ['[1]', 'a\\*b', 'ü' * 120])
def test_a_hugging_face_directory_becomes_a_checkpoint_of_any_name(tiny_gpt2, tmp_path, name):
    source = shutil.copytree(tiny_gpt2, tmp_path / 'from' / name)
    import_huggingface(source, tmp_path / name)
    assert sorted(load(tmp_path / name).params) == sorted(load(tiny_gpt2).params)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['from', name])
