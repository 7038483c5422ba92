"""`python -m gpt_jax.prepare`: what it prints, what it refuses."""

import os
import pathlib
import resource

import pytest


@pytest.fixture
def arguments(corpus, tmp_path):
    return [
        '--config=configs/smoke.py',
        f'--config.data.path={corpus}',
        '--config.data.tokenizer=char',
        f'--config.data.cache_dir={tmp_path}',
    ]


def test_it_prepares_once_and_inspects(verb, refused, arguments, tmp_path):
    status, output, _ = verb('prepare', *arguments)
    assert status == 0
    (folder,) = tmp_path.iterdir()
    *stages, last = output.splitlines()
    assert [line.split(':')[0] for line in stages] == ['tokenizer', 'text', 'tokens']
    assert last == f'done: {folder}'
    assert verb('prepare', *arguments)[1].splitlines() == [f'data: reused from {folder}', last]

    status, output, _ = verb('prepare', f'--inspect={folder}')
    assert status == 0
    assert 'every sha256 verified' in output
    shard = folder / 'train-00000.bin'
    shard.write_bytes(shard.read_bytes()[:-2] + b'\x00\x00')
    assert refused('prepare', f'--inspect={folder}').startswith(f'{shard}: damaged')


def test_the_pieces_of_several_machines_make_the_whole(verb, arguments, tmp_path):
    status, output, _ = verb('prepare', *arguments, '--piece=2/2', '--num_workers=1')
    assert status == 0
    assert output.splitlines()[-1].startswith('data: piece 2/2 is done; 1 of 2 parts are missing')
    status, output, _ = verb('prepare', *arguments, '--piece=1/2')
    assert output.splitlines()[-1].startswith('done: ')


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (['--piece=0/2'], '--piece=0/2: write I/N'),
        (['--piece=3/2'], '--piece=3/2'),
        (['--piece=half'], '--piece=half'),
        (['--num_workers=0'], 'data.num_workers=0 must be at least 1'),
        (['--config.data.documents=page'], "data.documents='page' must be one of whole, file, block"),
        (['--config.data.invalid_bytes=keep'], "data.invalid_bytes='keep' must be one of refuse, replace"),
        (['--config.data.validation_fraction=1.0'], 'data.validation_fraction=1.0 must be above 0'),
        (['--config.data.path=/nowhere.txt'], 'data.path=/nowhere.txt: no such file'),
        (
            ['--config.data.path=None', '--config.data.corpus=hub:nothing'],
            'data.corpus=hub:nothing: write hub:OWNER/NAME',
        ),
        (['--inspect=/nowhere'], '--inspect=/nowhere: no finished data there'),
        (['--config.data.streamin=True'], 'did you mean streaming?'),
    ],
)
def test_bad_input_is_one_line(refused, arguments, changes, says):
    assert says in refused('prepare', *arguments, *changes)


def test_without_a_config_it_says_so(refused):
    assert '--config is missing' in refused('prepare')


def test_help_is_printed(verb):
    status, output, _ = verb('prepare', '--help')
    assert status == 0
    assert all(f'--{name}:' in output for name in ('config', 'num_workers', 'piece', 'inspect'))
    assert pathlib.Path('gpt_jax/prepare.py').exists()


def test_data_for_fine_tuning_are_cut_by_the_tokenizer_of_the_weights(verb, tiny_gpt2, corpus, tmp_path):
    keys = {'train.init_from': tiny_gpt2, 'data.path': corpus, 'data.cache_dir': tmp_path}
    arguments = [f'--config.{key}={value}' for key, value in keys.items()]
    status, output, _ = verb('prepare', '--config=configs/finetune_gpt2.py', *arguments)
    assert status == 0
    folder = pathlib.Path(output.splitlines()[-1].removeprefix('done: '))
    assert (folder / 'tokenizer.json').read_bytes() == (tiny_gpt2 / 'tokenizer.json').read_bytes()


@pytest.mark.parametrize(
    'name', ['az://bucket/data', 'file:///data', 'file', 'file/data', 'loop', 'pipe', 'x' * 300, '/proc/x/y']
)
def test_a_cache_that_cannot_be_is_refused_before_any_work(refused, arguments, tmp_path, name):
    (tmp_path / 'file').touch()
    (tmp_path / 'loop').symlink_to('loop')
    os.mkfifo(tmp_path / 'pipe')
    before = sorted(tmp_path.iterdir())
    path = name if ':' in name or name.startswith('/') else tmp_path / name
    assert refused('prepare', *arguments, f'--config.data.cache_dir={path}').startswith(f'data.cache_dir={path}: ')
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_of_a_file(refused, arguments, tmp_path):
    """A limit of a file's size stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        line = refused('prepare', *arguments, '--num_workers=1')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'cannot be written (File too large)' in line
    assert not list(tmp_path.rglob('*.tmp'))
    assert not list(tmp_path.rglob('*.bin'))
