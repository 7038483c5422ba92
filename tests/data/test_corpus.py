import hashlib
import os
import subprocess
import sys

import pytest

from gpt_jax.data import DataConfig, load_corpus, python_docs
from gpt_jax.data.corpus import SPLITS
from gpt_jax.errors import InputError


def load(corpus='text', path=None, **keys):
    return load_corpus(DataConfig(corpus, None if path is None else str(path), **keys))


def error_line(function, *args):
    with pytest.raises(InputError) as caught:
        list(function(*args))
    message = str(caught.value)
    assert '\n' not in message
    return message


@pytest.fixture(scope='module')
def docs():
    corpus = load('python_docs')
    return {split: list(corpus.documents(split)) for split in SPLITS}


def test_python_docs_are_megabytes_of_text_with_a_tenth_held_out(docs):
    train, validation = (sum(len(text.encode()) for text in docs[split]) for split in SPLITS)
    assert 1.5e6 < train + validation < 4e6
    assert 0.04 < validation / (train + validation) < 0.2


def test_python_docs_read_like_pydoc(docs):
    texts = {text.split('\n', 1)[0]: text for split in SPLITS for text in docs[split]}
    assert 'class json.encoder.JSONEncoder(object)\n\nExtensible JSON' in texts['json.encoder']
    assert '\njson.encoder.JSONEncoder.default(self, o)\n\nImplement this method' in texts['json.encoder']
    assert any(text.startswith('lambda\n\n') for text in texts.values())  # a topic of help()


def test_python_docs_leave_out_tests_and_installed_packages(docs):
    names = {text.split('\n', 1)[0] for split in SPLITS for text in docs[split]}
    assert not [name for name in names if {'test', 'tests', 'idle_test', 'site-packages'} & set(name.split('.'))]


def test_no_document_is_in_both_splits_or_twice_in_one(docs):
    texts = docs['train'] + docs['validation']
    assert len(set(texts)) == len(texts)


def test_python_docs_hold_no_path_of_this_machine(docs):
    root = str(python_docs.library_root())
    assert not any(root in text for text in docs['train'] + docs['validation'])


def test_python_docs_are_the_same_in_another_process(docs):
    code = (
        'import hashlib; from gpt_jax.data import DataConfig, load_corpus; c = load_corpus(DataConfig());'
        'print(c.fingerprint, hashlib.sha256("".join(c.documents("train")).encode()).hexdigest())'
    )
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'PYTHONHASHSEED': '7'}
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment)
    here = hashlib.sha256(''.join(docs['train']).encode()).hexdigest()
    assert result.stdout.split() == [load('python_docs').fingerprint, here]


def small_library(tmp_path, monkeypatch):
    root = tmp_path / 'lib'
    (root / 'package' / 'tests').mkdir(parents=True)
    (root / 'package' / '__init__.py').write_text(
        '"""A package."""\n'
        'if True:\n    class A(Base):\n        """A class."""\n        async def f(self, x: int = 3, *, y=()):\n'
        '            """Line one.\n\n            Line two."""\n'
        'def g():\n    """G."""\n    def hidden():\n        """Not reachable."""\n'
    )
    (root / 'package' / 'tests' / 'test_it.py').write_text('"""A test."""')
    (root / 'broken.py').write_text('def f(:')
    (root / 'latin.py').write_bytes('"""Gr\u00fc\u00dfe"""'.encode('latin-1'))  # no coding line: not valid Python
    (root / 'cookie.py').write_bytes('# coding: latin-1\n"""Gr\u00fc\u00dfe"""'.encode('latin-1'))
    (root / 'surrogate.py').write_text('"""\\ud800"""')
    (root / 'silent.py').write_text('x = 1')
    monkeypatch.setattr(python_docs, 'library_root', lambda: root)
    monkeypatch.setattr(python_docs, '_topics', lambda: iter(()))
    monkeypatch.setattr(python_docs, 'documents', python_docs.documents.__wrapped__)
    return root


def test_library_files_that_are_broken_or_silent_are_skipped(tmp_path, monkeypatch):
    small_library(tmp_path, monkeypatch)
    assert python_docs.documents() == (
        'cookie\n\nGrüße\n',
        'package\n\nA package.\n\nclass package.A(Base)\n\nA class.\n\n'
        'package.A.f(self, x: int=3, *, y=())\n\nLine one.\n\nLine two.\n\npackage.g()\n\nG.\n',
    )


def test_python_docs_fingerprint_follows_the_library_and_ignores_its_place(tmp_path, monkeypatch):
    root = small_library(tmp_path, monkeypatch)
    before = python_docs.library_fingerprint()
    root.rename(tmp_path / 'moved')
    monkeypatch.setattr(python_docs, 'library_root', lambda: tmp_path / 'moved')
    assert python_docs.library_fingerprint() == before
    (tmp_path / 'moved' / 'silent.py').write_text('x = 10')
    assert python_docs.library_fingerprint() != before


def test_text_file_is_split_by_characters_at_nine_tenths(tmp_path):
    text = ''.join(chr(0x3B1 + i % 25) for i in range(109))  # two bytes a character
    path = tmp_path / 'text.txt'
    path.write_text(text, encoding='utf-8')
    for name in ('text', 'python_docs'):  # a path means the file, whatever the name
        corpus = load(name, path)
        assert corpus.name == 'text'
        assert list(corpus.documents('train')) == [text[:98]]
        assert list(corpus.documents('validation')) == [text[98:]]
        assert list(corpus.documents('train')) == [text[:98]]  # asking again starts again


def test_text_fingerprint_is_of_the_content(tmp_path):
    files = {name: tmp_path / name for name in 'abc'}
    for name, text in zip('abc', ('same text', 'same text', 'Same text'), strict=True):
        files[name].write_text(text)
    prints = [load('text', files[name]).fingerprint for name in 'abc']
    assert prints[0] == prints[1] != prints[2]
    assert len(bytes.fromhex(prints[0])) == 32


@pytest.mark.parametrize(
    ('content', 'says'), [(None, 'no such file'), (b'', 'empty'), (b'ab\xff', 'not UTF-8 at byte 2')]
)
def test_unusable_text_file_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / 'corpus.txt'
    if content is not None:
        path.write_bytes(content)
    message = error_line(lambda: load('text', path).documents('train'))
    assert f'data.path={path}' in message
    assert says in message


def test_directory_as_text_file_is_refused_by_name(tmp_path):
    assert f'data.path={tmp_path}: is a directory' in error_line(load, 'text', tmp_path)


def test_text_too_short_for_two_splits_is_refused(tmp_path):
    (tmp_path / 'one').write_text('x')
    assert 'one is empty: there is none of 1 characters for it' in error_line(
        load('text', tmp_path / 'one').documents, 'train'
    )


def test_unknown_corpus_lists_the_known_ones():
    message = error_line(load, 'wikipedia')
    assert all(name in message for name in ('data.corpus=wikipedia', 'python_docs', 'text', 'openwebtext_10k'))


def test_text_without_a_path_says_which_key_to_set():
    assert 'data.path' in error_line(load, 'text')


def test_unknown_split_is_a_bug():
    with pytest.raises(ValueError, match='test'):
        load('python_docs').documents('test')
