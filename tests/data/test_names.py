"""Files and folders may be called anything; a pattern is one only where nothing has its very name."""

import pathlib
from fractions import Fraction

import pytest

from gpt_jax.data import DataConfig, prepare
from gpt_jax.data.local import find_files
from gpt_jax.data.pipeline import parse_mixture
from gpt_jax.errors import InputError

NAMES = ['a[1]', '[a-c]', 'b]', 'c#d', 'e?', 's p', 'q"u\'o', '$HOME', 'st*r', 'co:lon', 'com,ma', 'new\nline', 'ünï']
NAMES += ['%41', 'a::b', '-dash', '~t', '**', '{x,y}', '\\n', 'tab\t', ' edges ', '!x', 'x;y&z|', 'http:', '日本']


def found(pattern):
    return [str(path) for path in find_files(str(pattern), f'data.path={pattern}')[0]]


@pytest.mark.parametrize('name', NAMES)
def test_a_folder_and_a_file_are_taken_by_their_names_and_patterns_work_inside(tmp_path, name, monkeypatch):
    folder = tmp_path / name
    folder.mkdir()
    for each in (f'{name}.txt', 'z.txt', 'z.md'):
        (folder / each).write_text('Some text of a file. ' * 20)
    decoy = tmp_path / 'a1'
    decoy.mkdir(exist_ok=True)
    (decoy / 'a1.txt').write_text('decoy')
    assert found(folder / f'{name}.txt') == [f'{folder}/{name}.txt']
    both = sorted(map(pathlib.Path, [f'{folder}/{name}.txt', f'{folder}/z.txt']))
    assert found(folder / '*.txt') == [str(path) for path in both]
    assert found(folder / '[yz].txt') == [f'{folder}/z.txt']
    monkeypatch.chdir(tmp_path)
    assert found(f'./{name}/z.*') == [f'{name}/z.md', f'{name}/z.txt']
    config = {'vocab_size': 260, 'cache_dir': str(tmp_path / f'cache{name}')}
    for _ in range(2):  # made, and used again
        lines = []
        data = prepare(DataConfig(path=f'{folder}/{name}.txt', **config), log=lines.append)
        assert list(data.prepared) == [f'{folder}/{name}.txt']
    assert lines[-1].startswith('data: reused from ')
    mixture = f'{folder}/{name}.txt:2,{folder}/*.md:1'
    assert parse_mixture(mixture) == {f'{folder}/{name}.txt': Fraction(2, 3), f'{folder}/*.md': Fraction(1, 3)}
    with pytest.raises(InputError) as caught:
        find_files(f'{folder}/nothing*', f'data.path={folder}/nothing*')
    assert '\n' not in str(caught.value)


def test_patterns_without_such_names_match_as_ever(tmp_path):
    for name in ('a1.txt', 'b2.txt', 'c/d/e.txt', 'x[1].txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('x')
    names = {'[ab]?.txt': ['a1.txt', 'b2.txt'], '**/*.txt': ['a1.txt', 'b2.txt', 'c/d/e.txt', 'x[1].txt']}
    names |= {'*/d/*': ['c/d/e.txt'], 'x[1].*': ['x[1].txt'], 'x[[]1].txt': ['x[1].txt']}
    for pattern, expected in names.items():
        assert found(tmp_path / pattern) == [f'{tmp_path}/{name}' for name in expected], pattern
    (tmp_path / 'x1.txt').write_text('x')
    assert found(tmp_path / 'x[1].txt') == [f'{tmp_path}/x[1].txt']  # the very name first


@pytest.mark.parametrize(
    ('path', 'says'),
    [
        ('', 'empty'),
        ('  ', 'is empty'),
        ('x' * 300, 'no such file'),
        ('a\0b', 'no such file'),
        ('a\nb', 'no such file'),
        ('~nobody-has-this-name/x.txt', 'no such file'),
        ('gs://bucket/x.txt', 'gs: is no place on this machine'),
        ('file:///x.txt', 'file: is no place on this machine'),
        ('.', 'is a directory'),
    ],
)
def test_what_names_no_file_is_one_line(tmp_path, path, says):
    with pytest.raises(InputError) as caught:
        prepare(DataConfig(path=path, cache_dir=str(tmp_path)), log=lambda line: None)
    assert 'data.path=' in str(caught.value)
    assert says in str(caught.value)
    assert '\n' not in str(caught.value)


def test_weights_are_read_in_bounded_time(tmp_path):
    for weight in ('1e999999999', '1e-999999999', '1E+1_000_000_000', '9' * 5000, '1e' + '9' * 5000):
        with pytest.raises(InputError, match='is no number'):
            parse_mixture(f'a:1,b:{weight}')
    assert parse_mixture('a:1e2,b:1_0/3')['a'] == Fraction(30, 31)
