"""Documents between separators: those of `str.split`, in any number of parts, beside all other ways to cut a text."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt_jax.data import DataConfig, corpus, formats, load_corpus, prepare
from gpt_jax.data.corpus import split_stretches
from gpt_jax.errors import InputError

END = '<|endoftext|>'


def load(path, **keys):
    return load_corpus(DataConfig(path=str(path), **keys))


def documents(corpus_):
    passages = [passage for part in corpus_.parts() for passage in corpus_.read(part, corpus_.decoder())]
    assert all(passage.ends_document for passage in passages)
    return [passage.text for passage in passages]


def notices(corpus_, markers=(END,)):
    return list(corpus_.notices(markers))


def quiet(line):
    pass


# Separators that overlap themselves, that begin like others, of several bytes, of line ends, of signs of patterns.
SEPARATORS = ['a', 'aa', 'aba', '--', '\n\n', END, 'é。', '。', ' ', '.*', '\r\n---\r\n']


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 30), st.integers(1, 12))
def test_documents_are_those_of_split_in_any_parts_and_blocks(tmp_path, data, part, block):
    separator = data.draw(st.sampled_from(SEPARATORS))
    alphabet = st.one_of(st.sampled_from([separator, separator[:1], 'a', 'b\n', '-', '𝄞', ' ']), st.text(max_size=3))
    text = ''.join(data.draw(st.lists(alphabet, max_size=25))) + f'x{separator}y'
    if not text.isprintable():
        text = text.encode(errors='ignore').decode().removeprefix('\ufeff')
    (tmp_path / 'a.txt').write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, 'PART_BYTES', part)
        patch.setattr(formats, 'BLOCK_BYTES', block)
        found = documents(load(tmp_path / 'a.txt', separator=separator))
    assert found == [document for document in text.split(separator) if document.strip()]


@pytest.mark.parametrize('signs', [2, 3, 5, 8])
def test_a_part_never_ends_inside_of_equal_signs_that_are_separators(tmp_path, monkeypatch, signs):
    text = ''.join(f'document {n}' + '-' * signs for n in range(6))
    (tmp_path / 'a.txt').write_text(text)
    for part in range(1, 30):
        monkeypatch.setattr(corpus, 'PART_BYTES', part)
        assert documents(load(tmp_path / 'a.txt', separator='--')) == [each for each in text.split('--') if each]


@given(st.lists(st.text('ab-', max_size=6)), st.text('ab-', min_size=1, max_size=3))
def test_a_text_in_stretches_is_split_as_a_whole(stretches, separator):
    assert list(split_stretches(stretches, separator)) == ''.join(stretches).split(separator)


def test_an_open_document_is_not_read_again_with_each_stretch():
    class Counted(str):
        __slots__ = ()
        added = 0

        def __radd__(self, other):
            Counted.added += len(other) + len(self)
            return str(other) + str(self)

    list(split_stretches((Counted('x' * 100) for _ in range(1000)), END))
    assert Counted.added < 120_000


TEXT = f'one\n\n1{END}two\n{END}\n{END}three\n\n3\n'


@pytest.mark.parametrize(
    ('documents_', 'expected'),
    [
        ('whole', ['one\n\n1', 'two\n', 'three\n\n3\n', 'other']),
        ('file', ['one\n\n1', 'two\n', 'three\n\n3\n', 'other']),
        ('block', ['one', '1', 'two', 'three', '3', 'other']),
    ],
)
def test_a_separator_ends_documents_beside_the_ends_of_files_and_blocks(tmp_path, documents_, expected):
    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'b.txt').write_text('other')  # has none: its end is enough
    assert documents(load(tmp_path / '*.txt', separator=END, documents=documents_)) == expected


def test_a_marker_that_nobody_asked_for_is_counted_in_one_line_with_the_way_out(tmp_path, monkeypatch):
    path = tmp_path / 'a.txt'
    path.write_text(END.join('abcd' for _ in range(400)))
    for block in (7, 2**22):
        monkeypatch.setattr(formats, 'BLOCK_BYTES', block)
        (notice,) = notices(load(path))
        assert f'399 times {END} in the text' in notice
        assert notice.endswith(f"--config.data.separator='{END}'")
    assert 'at least' not in notice
    assert notices(load(path, separator=END)) == []
    path.write_text(path.read_text() + '</s>')
    assert [f'{count} times {marker} ' in line for (count, marker), line in zip(
        ((399, END), (1, '</s>')), notices(load(path), (END, '</s>', END)), strict=True)] == [True, True]  # fmt: skip
    monkeypatch.setattr('gpt_jax.data.local.LARGE', 100)
    monkeypatch.setattr(formats, 'BLOCK_BYTES', 170)
    assert f'at least 10 times {END}' in notices(load(path))[0]
    (tmp_path / 'b.txt').write_text('no marker')
    assert notices(load(tmp_path / 'b.txt')) == []


def test_preparing_says_the_notice_and_ends_documents_where_asked(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text(END.join(f'Document {n}.' for n in range(100)))
    config = DataConfig(path=str(path), vocab_size=270, cache_dir=str(tmp_path / 'cache'))
    lines = []
    whole = prepare(config, log=lines.append)
    assert f'99 times {END}' in lines[0]
    lines.clear()
    cut = prepare(dataclasses.replace(config, separator=END), log=lines.append)
    assert not [line for line in lines if END in line]
    assert cut.fingerprint != whole.fingerprint
    (prepared,) = cut.prepared.values()
    assert prepared.train.documents + prepared.validation.documents == 100
    texts = prepared.tokenizer.decode([*prepared.train[:], *prepared.validation[:]]).split(END)[:-1]
    assert sorted(texts) == sorted(f'Document {n}.' for n in range(100))


@pytest.mark.parametrize(
    ('name', 'content', 'separator', 'says'),
    [
        ('a.txt', 'text', '<sep>', "data.separator='<sep>': it does not occur in data.path="),
        ('a.jsonl', '{"text": "a<sep>b"}', '<sep>', "data.separator='<sep>': a document is a row in data.path="),
        ('a.txt', 'text', '', 'data.separator='),
        ('a.txt', 'text', '\udc80', 'not UTF-8, so no text holds it'),
    ],
)
def test_a_separator_that_cannot_be_meant_is_refused(tmp_path, name, content, separator, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load(tmp_path / name, separator=separator)
    assert says in str(caught.value)
    assert '\n' not in str(caught.value)


def test_in_a_mixture_a_separator_is_for_the_texts_that_have_it(tmp_path):
    (tmp_path / 'cut.txt').write_text(END.join(f'Document {n}.' for n in range(100)))
    (tmp_path / 'whole.txt').write_text('words and words ' * 50)
    (tmp_path / 'rows.jsonl').write_text(''.join(f'{{"text": "Row {n}"}}\n' for n in range(100)))
    mixture = ','.join(f'{tmp_path}/{name}:1' for name in ('cut.txt', 'whole.txt', 'rows.jsonl'))
    config = DataConfig(mixture=mixture, vocab_size=270, cache_dir=str(tmp_path / 'cache'), separator=END)
    data = prepare(config, log=quiet)
    counts = [prepared.train.documents + prepared.validation.documents for prepared in data.prepared.values()]
    assert counts == [100, 2, 100]
    with pytest.raises(InputError, match=r"^data\.separator='no': stands in no text of data\.mixture="):
        prepare(dataclasses.replace(config, separator='no'), log=quiet)


def test_documents_of_their_own_are_not_cut():
    with pytest.raises(InputError, match=r'^data\.separator=.*python_docs has documents of its own'):
        load_corpus(DataConfig(separator=END))
