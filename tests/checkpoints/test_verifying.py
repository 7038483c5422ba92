"""The manifest finds every change of a listed file, and of itself."""

import json

import pytest

from gpt_jax.checkpoints import verifying
from gpt_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    (tmp_path / 'a' / 'b' / 'data').write_bytes(bytes(range(256)) * 100)
    (tmp_path / 'a' / 'empty').write_bytes(b'')
    (tmp_path / 'note').write_text('x')
    verifying.write(tmp_path)
    return tmp_path


def test_an_untouched_folder_passes_and_unlisted_files_do_not_matter(folder):
    verifying.verify(folder)
    (folder / '.DS_Store').write_text('')
    verifying.verify(folder)


def test_every_file_is_listed_with_the_hash_that_sha256sum_prints(folder):
    files = json.loads((folder / verifying.NAME).read_text())['files']
    assert sorted(files) == ['a/b/data', 'a/empty', 'note']
    assert files['note'] == {'bytes': 1, 'sha256': '2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881'}


def test_writing_again_leaves_no_temporary_file_and_does_not_list_itself(folder):
    (folder / f'.{verifying.NAME}.1234abcd.tmp').write_text('left by a killed process')
    verifying.write(folder)
    verifying.verify(folder)
    assert sorted(path.name for path in folder.iterdir()) == ['a', verifying.NAME, 'note']
    assert len(json.loads((folder / verifying.NAME).read_text())['files']) == 3


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda path: flip(path, 12345), 'is damaged'),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'has 25599 bytes instead of 25600'),
        (lambda path: path.write_bytes(path.read_bytes() + b'\0'), 'has 25601 bytes instead of 25600'),
        (lambda path: path.unlink(), 'is missing'),
    ],
    ids=['flipped bit', 'truncated', 'longer', 'deleted'],
)
def test_a_changed_file_is_named_with_the_way_out(folder, damage, message):
    damage(folder / 'a' / 'b' / 'data')
    with pytest.raises(InputError, match=message) as error:
        verifying.verify(folder, way_out=lambda: 'ask Ada')
    assert str(folder / 'a' / 'b' / 'data') in str(error.value)
    assert str(error.value).endswith(': ask Ada')


def test_any_flipped_byte_of_the_manifest_itself_is_refused(folder):
    for position in range((folder / verifying.NAME).stat().st_size):
        flip(folder / verifying.NAME, position)
        with pytest.raises(InputError):
            verifying.verify(folder)
        flip(folder / verifying.NAME, position)
    verifying.verify(folder)


def test_a_missing_manifest_is_named(folder):
    (folder / verifying.NAME).unlink()
    assert not verifying.exists(folder)
    with pytest.raises(InputError, match=f'has no {verifying.NAME}'):
        verifying.verify(folder)


def test_a_choice_of_files_and_shares_check_only_those(folder):
    (folder / 'note').write_text('y')
    verifying.verify(folder, lambda name: name.startswith('a/'))
    with pytest.raises(InputError, match='lists too few files'):
        verifying.verify(folder, lambda name: False)
    verifying.verify(folder, part=(0, 3))
    verifying.verify(folder, part=(1, 3))
    with pytest.raises(InputError, match='note'):
        verifying.verify(folder, part=(2, 3))
