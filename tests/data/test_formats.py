"""What a file is follows from its content; what it holds does not depend on how it is packed."""

import bz2
import codecs
import gzip
import hashlib
import json
import os
import socket

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_jax.data import DataConfig, corpus, formats, load_corpus, prepare
from gpt_jax.data.corpus import SPLITS, Decoder
from gpt_jax.errors import InputError

TEXTS = [f'Document {n}: Grüße, {{"{n}"}}' for n in range(40)]
LINES = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in TEXTS).encode()
ROWS = [{'text': text} for text in TEXTS]
MARK = codecs.BOM_UTF8


def load(path, **keys):
    return load_corpus(DataConfig(path=str(path), **keys))


def documents(corpus_):
    decoder = corpus_.decoder()
    passages = [passage for part in corpus_.parts() for passage in corpus_.read(part, decoder)]
    assert {passage.split for passage in passages} <= set(SPLITS)
    return [passage.text for passage in passages]


def line(function, *args, **keys):
    with pytest.raises(InputError) as caught:
        function(*args, **keys)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, 'zstd') as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def parquet(type_=None):
    sink = pyarrow.BufferOutputStream()
    values = pyarrow.array(TEXTS, pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({'text': values.cast(type_) if type_ else values}), sink)
    return sink.getvalue().to_pybytes()


PACKED = {
    **{f'lines.{ending}': LINES for ending in ('jsonl', 'JSONL', 'ndjson', 'jsonlines', 'json', 'Json')},
    'marked.jsonl': MARK + LINES,
    'crlf.jsonl': LINES.replace(b'\n', b'\r\n'),
    'array.json': json.dumps(ROWS).encode(),
    'pretty.json': json.dumps(ROWS, indent=2).encode(),
    'marked.json': b'\n' + json.dumps(ROWS, indent='\t').encode() + b'\n\n',
    'array.jsonl': json.dumps(ROWS, indent=2).encode(),
    'a.jsonl.gz': gzip.compress(LINES),
    'A.JSONL.GZ': gzip.compress(MARK + LINES),
    'two-members.jsonl.gz': gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    'zeros.jsonl.gz': gzip.compress(LINES) + bytes(5000),
    'zeros-between.jsonl.gz': gzip.compress(LINES[:100]) + bytes(7) + gzip.compress(LINES[100:]) + bytes(1),
    'array.json.gz': gzip.compress(json.dumps(ROWS, indent=2).encode()),
    'a.zst': zstd(LINES),
    'two-frames.jsonl.zst': zstd(LINES[:100]) + zstd(LINES[100:]),
    'gzip.txt': gzip.compress(LINES),
    'zstd.jsonl': zstd(LINES),
    'no-ending-gzip': gzip.compress(LINES),
    'a.Parquet': parquet(),
    'parquet.bin': parquet(),
}


@pytest.mark.parametrize('name', PACKED)
def test_however_rows_are_packed_and_called_they_are_the_same(tmp_path, monkeypatch, name):
    monkeypatch.setattr(formats, 'BLOCK_BYTES', 50)
    (tmp_path / name).write_bytes(PACKED[name])
    assert documents(load(tmp_path / name)) == TEXTS


TYPES = {
    'large_string': pyarrow.large_string(),
    'string_view': pyarrow.string_view(),
    'dictionary': pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    'dictionary of large_string': pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    'binary': pyarrow.binary(),
    'large_binary': pyarrow.large_binary(),
    'binary_view': pyarrow.binary_view(),
    'json': pyarrow.json_(),
}


@pytest.mark.parametrize('name', TYPES)
def test_a_column_of_text_may_be_of_any_of_arrows_types(tmp_path, name):
    values = pyarrow.array([*TEXTS, None, ''], pyarrow.string()).cast(TYPES[name])
    # Without the file's record of Arrow's own type, which is what other writers leave, and with it.
    for number, stored in enumerate((True, False)):
        path = tmp_path / f'{number}.parquet'
        pyarrow.parquet.write_table(pyarrow.table({'text': values}), path, row_group_size=16, store_schema=stored)
        assert documents(load(path)) == TEXTS


@pytest.mark.parametrize('values', [[1, 2], [1.5], [['a']], [{'a': 'b'}], [True]], ids=str)
def test_a_column_of_anything_else_is_refused_by_its_type(tmp_path, values):
    pyarrow.parquet.write_table(pyarrow.table({'text': values}), tmp_path / 'a.parquet')
    assert 'data.column=text: of type ' in line(lambda: documents(load(tmp_path / 'a.parquet')))


def test_a_column_of_nothing_has_no_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({'text': pyarrow.nulls(3)}), tmp_path / 'a.parquet')
    assert 'no document has any text' in line(lambda: list(load(tmp_path / 'a.parquet').documents('train')))


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(['x']), pyarrow.array(['y'])], names=['text', 'text'])
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    assert 'several columns of that name' in line(lambda: documents(load(tmp_path / 'a.parquet')))


BAD = {
    'trailing garbage': ('a.jsonl.gz', gzip.compress(LINES) + b'garbage', 'not a gzip file, or damaged'),
    'cut gzip': ('a.jsonl.gz', gzip.compress(LINES)[:-9], 'not a gzip file, or damaged'),
    'bits of gzip': ('a.jsonl.gz', gzip.compress(LINES)[:60] + bytes(60) + gzip.compress(LINES)[120:], 'or damaged'),
    'cut zstd': ('a.jsonl.zst', zstd(LINES)[:-9], 'not a zstd file, or damaged'),
    'garbage after zstd': ('a.jsonl.zst', zstd(LINES) + b'garbage', 'not a zstd file, or damaged'),
    'compressed text': ('a.txt.gz', gzip.compress(b'some text'), 'of compressed files only JSON lines'),
    'compressed parquet': ('a.parquet.gz', gzip.compress(parquet()), 'parquet inside of gzip; uncompress it'),
    'UTF-16': ('a.txt', 'Grüße'.encode('utf-16'), 'is UTF-16; make UTF-8 of it: iconv -f UTF-16 -t UTF-8'),
    'UTF-16 JSON': ('a.jsonl', LINES.decode().encode('utf-16'), 'is UTF-16'),
    'UTF-16 unmarked': ('a.txt', ('hello ' * 9).encode('utf-16-be'), 'iconv -f UTF-16BE -t UTF-8'),
    'UTF-16 unmarked little': ('a.jsonl', ('hello ' * 9).encode('utf-16-le'), 'iconv -f UTF-16LE -t UTF-8'),
    'UTF-32': ('a.txt', 'hello'.encode('utf-32'), 'is UTF-32'),
    'PDF': ('a.txt', b'%PDF-1.7 ...', 'is PDF, not text'),
    'bzip2': ('a.jsonl.bz2', bz2.compress(LINES, 3), 'is compressed by bzip2'),
    'zip': ('a.jsonl', b'PK\x03\x04....', 'is a zip archive'),
    'LFS': ('a.parquet', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', 'git lfs pull'),
    'one object': ('a.json', b'{\n "text": "x"\n}', 'neither an object a line nor one array of objects'),
    'object of data': ('a.json', b'{"data": [{"text": "x"}]}', "line 1: no JSON object with the key 'text'"),
    'array of texts': ('a.json', b'["x", "y"]', "line 1: no JSON object with the key 'text'"),
    'array without end': ('a.json', b'[{"text": "x"}, {"text": "y"}', 'no comma and no ] after element 2'),
    'array without comma': ('a.json', b'[{"text": "x"} {"text": "y"}]', 'no comma and no ] after element 1'),
    'array cut in two': ('a.json', b'[{"text": "x"}, {"text": "y', 'element 2: not JSON'),
    'comma at the end': ('a.json', b'[{"text": "x"},]', 'element 2: not JSON'),
    'after the array': ('a.json', b'[{"text": "x"}]\n[{"text": "y"}]', 'more text after the end of the array'),
    'other key': ('a.json', b'[{"text": "x"}, {"body": "y"}]', "element 2: no JSON object with the key 'text'"),
    'not text': ('a.json', b'[{"text": 1}]', "element 1: 'text' is not text"),
    'surrogate': ('a.json', b'[{"text": "\\ud800"}]', 'element 1: lone surrogate'),
    'not UTF-8': ('a.json', b'[{"text": "\xff"}]', 'not UTF-8 at byte 11'),
    'deep line': ('a.jsonl', b'{"text": ' + b'[' * 200_000, 'line 1: nested too deeply'),
    'deep array': ('a.json', b'[{"a": ' + b'[' * 200_000, 'element 1: nested too deeply'),
    'empty': ('a.jsonl', b'', 'the file is empty;'),
    'empty gzip': ('a.jsonl.gz', gzip.compress(b''), 'no document has any text'),
    'a mark alone': ('a.txt', MARK, 'the file is empty but for a byte order mark'),
    'spaces alone': ('a.txt', b' \r\n\t' * 25 + '\u3000'.encode(), '103 bytes of nothing but white space'),
    'blank lines': ('a.jsonl', b'\n\n', 'no document has any text'),
}


@pytest.mark.parametrize('case', BAD)
def test_what_cannot_be_read_is_one_line_with_the_file(tmp_path, case):
    name, content, says = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    message = line(lambda: list(load(path).documents('train')))
    assert says in message
    assert str(path) in message


def test_an_array_is_read_in_pieces_and_an_element_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, 'BLOCK_BYTES', 7)
    monkeypatch.setattr(formats, 'LINE_BYTES', 1000)
    read = []
    real = formats.texts
    monkeypatch.setattr(
        formats, 'texts', lambda *args, **keys: (read.append(text) or text for text in real(*args, **keys))
    )
    path = tmp_path / 'a.json'
    path.write_bytes(json.dumps(ROWS).encode())
    rows = formats.json_rows(path, 'text', 0, formats.ENDLESS, Decoder(False))
    assert next(rows) == TEXTS[0]
    assert sum(map(len, read)) < 150
    read.clear()
    path.write_bytes(b'[{"text": "' + b'x' * 100_000)
    assert 'element 1: not JSON' in line(next, formats.json_rows(path, 'text', 0, formats.ENDLESS, Decoder(False)))
    assert sum(map(len, read)) < 5000


@pytest.mark.parametrize('kind', ['pipe', 'socket', 'device', 'folder', 'link to itself'])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    if kind == 'pipe':
        os.mkfifo('x.txt')
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind('x.txt')
    elif kind == 'folder':
        (tmp_path / 'x.txt').mkdir()
    else:
        os.symlink('/dev/zero' if kind == 'device' else 'x.txt', 'x.txt')
    for path in ('x.txt', '*.txt'):
        assert f'data.path={path}' in line(load, path)
    # Among files it is passed over, and that is said; a folder always may be among them.
    (tmp_path / 'y.txt').write_text('some text')
    corpus_ = load('*.txt')
    assert [path.name for path in corpus_.paths] == ['y.txt']
    assert ['passed over x.txt' in notice for notice in corpus_.notices(())] == [True] * (kind != 'folder')


def test_text_that_looks_like_rows_is_trained_on_as_before_and_that_is_said(tmp_path):
    (tmp_path / 'a.txt').write_bytes(LINES)
    corpus_ = load(tmp_path / 'a.txt')
    assert ''.join(documents(corpus_)) == LINES.decode()
    (notice,) = corpus_.notices(())
    assert 'looks like rows of JSON' in notice
    (tmp_path / 'b.txt').write_text('{"a quotation": in prose}\n[{brackets}]')
    assert list(load(tmp_path / 'b.txt').notices(())) == []


def test_json_among_source_code_stays_source_code(tmp_path):
    (tmp_path / 'package.json').write_text('{"name": "x"}')
    (tmp_path / 'list.json').write_text('[{"name": "x"}]')
    (tmp_path / 'pretty.json').write_text('{\n  "name": "x"\n}')
    (tmp_path / 'x.py').write_text('print(1)\n')
    found = documents(load(tmp_path / '*', documents='file'))
    assert sorted(found) == sorted(path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize('keys', [{}, {'documents': 'file'}, {'documents': 'block'}, {'separator': 'X'}])
def test_a_byte_order_mark_at_the_beginning_of_each_file_is_no_text(tmp_path, monkeypatch, keys):
    monkeypatch.setattr(corpus, 'PART_BYTES', 8)
    monkeypatch.setattr(formats, 'BLOCK_BYTES', 4)
    found = []
    for mark in (b'', MARK):
        folder = tmp_path / f'{len(mark)}'
        folder.mkdir()
        for name, text in {'a.txt': 'one é two\n\nthreeXfour', 'b.txt': '', 'c.txt': 'five\n\nsi\ufeffX seven'}.items():
            (folder / name).write_bytes(mark + text.encode())
        corpus_ = load(folder / '*.txt', **keys)
        of_split = dict.fromkeys(SPLITS, '')
        for part in corpus_.parts():
            for passage in corpus_.read(part, corpus_.decoder()):
                of_split[passage.split] += passage.text + '|' * passage.ends_document
        found.append({split: text.strip('|') for split, text in of_split.items()})
    assert found[0] == found[1]
    assert ''.join(found[1].values()).count('\ufeff') == 1  # one inside of the text is a character of it


def test_the_fingerprint_of_a_text_is_what_it_was_and_another_with_a_mark(tmp_path):
    """Of marked text earlier versions made other tokens, which must not be taken for these."""

    def before(data):
        return hashlib.sha256(
            json.dumps(['whole', '', 0.1, False, [hashlib.sha256(data).hexdigest()]]).encode()
        ).hexdigest()

    for data in (b'some text', MARK + b'some text'):
        (tmp_path / 'a.txt').write_bytes(data)
        assert (load(tmp_path / 'a.txt').fingerprint == before(data)) == (data[:3] != MARK)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(['a.txt', 'a.json', 'a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet', 'a']),
    base=st.sampled_from([b'', LINES, gzip.compress(LINES), zstd(LINES), parquet(), json.dumps(ROWS).encode()]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 30)), max_size=4),
    keys=st.fixed_dictionaries(
        {}, optional={'invalid_bytes': st.just('replace'), 'documents': st.sampled_from(['file', 'block'])}
    ),
)
def test_random_bytes_are_documents_or_one_line(tmp_path, name, base, changes, keys):
    data = bytearray(base)
    for place, new, removed in changes:
        start = int(place * len(data))
        data[start : start + removed] = new
    (tmp_path / name).write_bytes(data)
    message = str(tmp_path)
    try:
        assert all(isinstance(text, str) for text in documents(load(tmp_path / name, **keys)))
    except InputError as error:
        message = str(error)
    assert '\n' not in message
    assert str(tmp_path) in message


def test_an_empty_split_names_a_share_that_helps(tmp_path):
    for count in range(2, 12):
        path = tmp_path / f'{count}.jsonl'
        path.write_bytes(b''.join(json.dumps({'text': f'{count} {n}'}).encode() + b'\n' for n in range(count)))
        for fraction, split in ((1e-9, 'validation'), (1 - 1e-9, 'train')):
            message = line(lambda f=fraction, s=split, p=path: list(load(p, validation_fraction=f).documents(s)))
            share = float(message.partition('--config.data.validation_fraction=')[2])
            for each in SPLITS:
                assert list(load(path, validation_fraction=share).documents(each))


@pytest.mark.parametrize(('text', 'documents_'), [('ab', 'whole'), ('one\n\ntwo', 'block')])
def test_preparing_with_the_share_that_is_named_works(tmp_path, text, documents_):
    (tmp_path / 'a.txt').write_text(text)
    keys = {'path': str(tmp_path / 'a.txt'), 'documents': documents_, 'vocab_size': 257, 'cache_dir': str(tmp_path)}
    lines = []
    message = line(prepare, DataConfig(**keys, validation_fraction=1 - 1e-9), log=lines.append)
    share = float(message.partition('--config.data.validation_fraction=')[2])
    assert prepare(DataConfig(**keys, validation_fraction=share), log=lines.append) is not None
