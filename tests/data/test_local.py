import gzip
import itertools
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_jax.data import DataConfig, corpus, formats, load_corpus, local
from gpt_jax.data.corpus import SPLITS
from gpt_jax.errors import InputError

TEXTS = [f'Document {n}: Grüße, {"x" * (n % 7)}' for n in range(120)]


def load(path, **keys):
    return load_corpus(DataConfig('text', str(path), **keys))


def splits(corpus_):
    """Split -> its documents, put together from their passages; and how many characters were replaced."""
    found, open_, decoder = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, ''), corpus_.decoder()
    for part in corpus_.parts():
        for passage in corpus_.read(part, decoder):
            open_[passage.split] += passage.text
            if passage.ends_document:
                found[passage.split].append(open_[passage.split])
                open_[passage.split] = ''
    assert set(open_.values()) == {''}
    return found, decoder.replaced


def line(function):
    with pytest.raises(InputError) as caught:
        function()
    assert '\n' not in str(caught.value)
    return str(caught.value)


def json_lines(texts, key='text'):
    return ''.join(json.dumps({'id': n, key: text}) + '\n' for n, text in enumerate(texts)).encode()


def write_parquet(path, texts, rows=7, column='text'):
    pyarrow.parquet.write_table(pyarrow.table({'n': list(range(len(texts))), column: texts}), path, row_group_size=rows)


def write(folder, form):
    if form == 'parquet':
        write_parquet(folder / 'a.parquet', TEXTS)
        return folder / 'a.parquet'
    if form == 'block':
        (folder / 'a.txt').write_text('\n\n'.join(TEXTS), encoding='utf-8')
        return folder / 'a.txt'
    if form == 'file':
        for n, text in enumerate(TEXTS):
            (folder / f'{n:03}.txt').write_text(text, encoding='utf-8')
        return folder / '*.txt'
    path = folder / f'a.{form}'
    data = json_lines(TEXTS)
    if form == 'jsonl.zst':
        with pyarrow.CompressedOutputStream(str(path), 'zstd') as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if form == 'jsonl.gz' else data)
    return path


@pytest.mark.parametrize('size', [2**26, 300])
@pytest.mark.parametrize('form', ['parquet', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'block', 'file'])
def test_every_form_gives_the_same_documents_in_the_same_splits(tmp_path, monkeypatch, form, size):
    monkeypatch.setattr(corpus, 'PART_BYTES', size)
    corpus_ = load(write(tmp_path, form), documents=form if form in ('block', 'file') else 'whole')
    found, replaced = splits(corpus_)
    assert replaced == 0
    assert sorted(found['train'] + found['validation']) == sorted(TEXTS)
    assert [text for text in TEXTS if text in found['train']] == found['train']
    assert found['validation'] == [text for text in TEXTS if corpus.split_of(text, 0.05) == 'validation'] != []
    assert (len(corpus_.parts()) > 3) == (size == 300 and form not in ('jsonl.gz', 'jsonl.zst'))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.text(st.sampled_from('ab é\n\r\t。\u3000𝄞'), min_size=12, max_size=80), st.integers(4, 40), st.integers(1, 20)
)
def test_a_running_text_is_the_same_however_it_is_divided(tmp_path, small_bpe, text, size, block):
    path = tmp_path / 'text.txt'
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, 'PART_BYTES', size)
        patch.setattr(formats, 'BLOCK_BYTES', block)
        corpus_ = load(path)
        found, _ = splits(corpus_)
        ids = {split: [] for split in SPLITS}
        for part in corpus_.parts():
            for passage in corpus_.read(part, corpus_.decoder()):
                ids[passage.split] += small_bpe.encode(passage.text)
    middle = int(len(text) * 0.9)
    assert found == {'train': [text[:middle]], 'validation': [text[middle:]]}
    # A cut inside of a word, where a stretch has no space, may change the ids there; none of these letters merge.
    assert {split: small_bpe.decode(ids[split]) for split in SPLITS} == {
        'train': text[:middle],
        'validation': text[middle:],
    }


def test_a_running_text_in_several_files_is_split_by_all_their_characters(tmp_path):
    for name, text in (('a.txt', 'a' * 60), ('b.txt', 'b' * 25), ('c.txt', 'c' * 15)):
        (tmp_path / name).write_text(text)
    found, _ = splits(load(tmp_path / '*.txt'))
    assert found == {'train': ['a' * 60, 'b' * 25, 'c' * 5], 'validation': ['c' * 10]}


def test_blocks_may_be_longer_than_a_read_and_their_blank_lines_hold_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, 'BLOCK_BYTES', 8)
    (tmp_path / 'a.txt').write_bytes('\n\nfirst line\nsecond é line\r\n \t\r\n\n\nlast\n'.encode())
    found, _ = splits(load(tmp_path / 'a.txt', documents='block'))
    assert found['train'] + found['validation'] == ['first line\nsecond é line', 'last']


def test_copies_of_a_document_are_in_one_split(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(json_lines(TEXTS * 3))
    found, _ = splits(load(tmp_path / 'a.jsonl'))
    assert not set(found['train']) & set(found['validation'])
    assert len(found['train']) + len(found['validation']) == 3 * len(TEXTS)


def test_the_share_that_is_held_out_and_the_column_can_be_chosen(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(json_lines(TEXTS, 'body'))
    found, _ = splits(load(tmp_path / 'a.jsonl', column='body', validation_fraction=0.5))
    assert 40 < len(found['validation']) < 80
    (tmp_path / 'b.txt').write_text('0123456789')
    assert splits(load(tmp_path / 'b.txt', validation_fraction=0.4))[0]['validation'] == ['6789']


@settings(deadline=None)
@given(text=st.text('ab \n\t\r', max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_blocks_do_not_depend_on_where_reading_stops(text, cuts):
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stretches = [text[start:stop] for start, stop in itertools.pairwise(edges)]
    expected = [block.strip('\r\n') for block in re.split(r'\n[ \t\r\n]*\n', text)]
    assert [block for block in local._parted(iter(stretches)) if block] == [block for block in expected if block]


@pytest.mark.parametrize('documents', ['whole', 'file', 'block'])
def test_invalid_bytes_are_refused_or_replaced_and_counted(tmp_path, monkeypatch, documents):
    monkeypatch.setattr(formats, 'BLOCK_BYTES', 5)
    path = tmp_path / 'a.txt'
    path.write_bytes(b'abcd\xe9f \xef\xbf\xbd g\xff\n' + b'z' * 40)
    message = line(lambda: splits(load(path, documents=documents)))
    assert f'data.path={path}: not UTF-8 at byte 4' in message
    assert 'data.invalid_bytes=replace' in message
    found, replaced = splits(load(path, documents=documents, invalid_bytes='replace'))
    assert ''.join(found['train'] + found['validation']) == 'abcd\ufffdf \ufffd g\ufffd\n' + 'z' * 40
    assert replaced == 2  # the U+FFFD that was there is none of ours


def test_invalid_text_in_rows_is_refused_or_replaced(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": "ok"}\n{"text": "a\\ud800b"}\n{"text": "c\xff"}\n')
    assert f'{tmp_path}/a.jsonl, line 2: lone surrogate' in line(lambda: splits(load(tmp_path / 'a.jsonl')))
    found, replaced = splits(load(tmp_path / 'a.jsonl', invalid_bytes='replace'))
    assert sorted(found['train'] + found['validation']) == ['a\ufffdb', 'c\ufffd', 'ok']
    assert replaced == 2
    table = pyarrow.table({'text': pyarrow.array([b'fine', b'not\xff'], pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    assert 'a row of' in line(lambda: splits(load(tmp_path / 'a.parquet')))
    assert splits(load(tmp_path / 'a.parquet', invalid_bytes='replace'))[1] == 1


def test_rows_without_text_are_left_out(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": ""}\n\n{"text": null}\n{"text": "one"}')
    write_parquet(tmp_path / 'a.parquet', ['', None, 'one'])
    for name in ('a.jsonl', 'a.parquet'):
        found, _ = splits(load(tmp_path / name))
        assert found['train'] + found['validation'] == ['one']


@pytest.mark.parametrize(
    ('name', 'content', 'says'),
    [
        ('a.jsonl', b'{"text": "x"}\n{"text": \n', 'line 2: not JSON'),
        ('a.jsonl', b'{"text": "x"}\n["text"]\n', "line 2: no JSON object with the key 'text'"),
        ('a.jsonl', b'{"body": "x"}\n', '--config.data.column'),
        ('a.jsonl', b'{"text": 3}\n', "'text' is not text"),
        # Without the time: the workers of pytest-xdist must give a test the same name.
        ('a.jsonl.gz', gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:40], 'damaged'),
        ('a.jsonl.gz', b'no gzip', 'damaged'),
        ('a.jsonl.zst', b'no zstd', 'damaged'),
        ('a.parquet', b'no parquet', 'not a parquet file'),
        ('a.txt.gz', gzip.compress(b'x', mtime=0), 'of compressed files only JSON lines'),
        ('a.txt', b'', 'the file is empty'),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    message = line(lambda: splits(load(tmp_path / name)))
    assert str(tmp_path / name) in message
    assert says in message


def test_a_column_that_is_not_there_or_not_text_is_refused(tmp_path):
    write_parquet(tmp_path / 'a.parquet', ['x'])
    assert 'no such column, only n, text' in line(lambda: splits(load(tmp_path / 'a.parquet', column='body')))
    assert 'of type int64' in line(lambda: splits(load(tmp_path / 'a.parquet', column='n')))


def test_paths_that_name_nothing_or_too_much_are_refused(tmp_path):
    (tmp_path / 'a.txt').write_text('x')
    (tmp_path / 'a.jsonl').write_text('x')
    assert 'several kinds' in line(lambda: load(tmp_path / '*'))
    assert 'no such file' in line(lambda: load(tmp_path / '*.parquet'))
    assert f'{tmp_path}/*.txt' in line(lambda: load(tmp_path))


def test_an_empty_file_among_others_does_no_harm(tmp_path):
    for name, text in (('a.txt', 'abcdefghij'), ('b.txt', ''), ('c.txt', 'klmnopqrst')):
        (tmp_path / name).write_text(text)
    found, _ = splits(load(tmp_path / '*.txt'))
    assert found == {'train': ['abcdefghij', 'klmnopqr'], 'validation': ['st']}


def test_a_file_whose_name_has_wildcards_is_taken_by_its_name(tmp_path):
    (tmp_path / 'a[1].txt').write_text('0123456789')
    assert splits(load(tmp_path / 'a[1].txt'))[0]['validation'] == ['9']


def test_a_line_of_json_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, 'LINE_BYTES', 100)
    (tmp_path / 'a.jsonl').write_bytes(json_lines(['x' * 200]))
    assert 'line 1: longer than 100 bytes' in line(lambda: splits(load(tmp_path / 'a.jsonl')))


def test_a_plain_text_without_a_line_end_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, 'BLOCK_BYTES', 1000)
    (tmp_path / 'a.txt').write_text('word ' * 5000)
    corpus_ = load(tmp_path / 'a.txt')
    passages = [passage for part in corpus_.parts() for passage in corpus_.read(part, corpus_.decoder())]
    assert max(len(passage.text) for passage in passages) <= 1005
    assert ''.join(passage.text for passage in passages) == 'word ' * 5000


@pytest.mark.parametrize('change', [{'documents': 'block'}, {'validation_fraction': 0.2}, {'invalid_bytes': 'replace'}])
def test_how_a_text_is_read_is_part_of_its_fingerprint(tmp_path, change):
    (tmp_path / 'a.txt').write_text('x y z')
    assert load(tmp_path / 'a.txt', **change).fingerprint != load(tmp_path / 'a.txt').fingerprint
    assert load(tmp_path / 'a.txt', column='other').fingerprint == load(tmp_path / 'a.txt').fingerprint
