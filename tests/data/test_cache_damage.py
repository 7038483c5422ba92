"""Whatever stands in the place of a file of the data cache: it is made anew, or refused by its name. Nothing hangs."""

import json
import os
import pathlib
import shutil

import pytest

from gpt_jax.data import DataConfig, prepare
from gpt_jax.data.shards import inspect
from gpt_jax.errors import InputError

NAMES = ('manifest.json', 'source.json', 'tokenizer.json', 'train-00000.bin', 'parts/00000.json', 'verified.json')
JUNK = {
    'nothing': b'',
    'half': b'{"half',
    'a list': b'[1, 2]',
    'null': b'null',
    'an object': b'{}',
    'of others': b'{"splits": {"train": {"tokens": 1}}, "files": 3, "train-00000.bin": {}}',
    'deep': b'[' * 100_000,
    'bytes': bytes(range(256)),
}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made')
    (folder / 'a.txt').write_text('\n\n'.join(f'Document {n} of a text.' for n in range(100)))
    config = {'path': str(folder / 'a.txt'), 'documents': 'block', 'vocab_size': 270}
    prepare(DataConfig(**config, cache_dir=str(folder / 'cache')), log=lambda line: None)
    return config, folder / 'cache'


def tried(made, tmp_path, damage):
    """The data after `damage` of their folder, or None with the one line that refuses them, which names the folder."""
    config, cache = made
    cache = pathlib.Path(shutil.copytree(cache, tmp_path / 'cache'))
    (folder,) = cache.iterdir()
    damage(folder)
    try:
        return prepare(DataConfig(**config, cache_dir=str(cache)), log=lambda line: None)
    except InputError as error:
        refusal = str(error)
    assert '\n' not in refusal
    assert str(folder) in refusal
    return None


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('junk', [*JUNK, 'a folder', 'a pipe', 'a broken link'])
@pytest.mark.parametrize('finished', [True, False])
def test_a_foreign_file_in_its_place_is_replaced_or_refused(made, tmp_path, name, junk, finished):
    def damage(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        if junk in JUNK:
            path.write_bytes(JUNK[junk])
        elif junk == 'a folder':
            path.mkdir()
        elif junk == 'a pipe':
            os.mkfifo(path)
        else:
            path.symlink_to('nowhere')
        if name == 'verified.json':
            os.utime(folder / 'train-00000.bin')  # asks what was verified
        if not finished and name != 'manifest.json':
            (folder / 'manifest.json').unlink()

    tried(made, tmp_path, damage)


PLACES = ['format', 'corpus', 'source', 'split', 'tokenizer_fingerprint', 'fingerprint', 'replaced_bytes', 'tokens']
PLACES += ['bytes', 'shards', 'documents']


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('value', [None, -1, 'x', [1], {'train': 1}])
def test_an_entry_of_another_kind_is_refused_or_does_no_harm(made, tmp_path, place, value):
    def damage(folder):
        path = folder / 'manifest.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | {place: value}))

    tried(made, tmp_path, damage)
    (folder,) = (tmp_path / 'cache').iterdir()
    try:
        list(inspect(folder))
    except InputError as error:
        refusal = str(error)
    else:
        refusal = ''
    assert '\n' not in refusal


@pytest.mark.parametrize(
    'cache', ['{tmp}/file', '{tmp}/file/x/y', '/proc/x/y', '/dev/null', '{tmp}/loop', 'a\0b', 'az://b/x', 'x' * 300]
)
def test_a_folder_that_cannot_be_made_is_one_line(made, tmp_path, cache):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(InputError) as caught:
        prepare(DataConfig(**made[0], cache_dir=cache.format(tmp=tmp_path)), log=lambda line: None)
    assert str(caught.value).startswith('data.cache_dir=')
    assert '\n' not in str(caught.value)
