import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_jax.data import Tokens, read_header, write_shard
from gpt_jax.data.shards import HEADER, verify_shard
from gpt_jax.errors import InputError

PRINT = 'ab' * 32
END = 7
FIELDS = {
    'magic': 0,
    'version': 8,
    'dtype': 12,
    'count': 16,
    'documents': 25,
    'vocab_size': 32,
    'tokenizer': 40,
    'end': 110,
}


class Vocabulary:
    """What a shard needs of a tokenizer."""

    def __init__(self, vocab_size=300, fingerprint=PRINT):
        self.vocab_size, self.fingerprint, self.end_of_text = vocab_size, fingerprint, END


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / 'train.bin'
    assert write_shard(path, [[1, END], [], np.array([299])], Vocabulary()).tokens == 3
    return path


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(65536, '<u2'), (65537, '<u4')])
def test_tokens_come_back_in_the_smallest_dtype_that_fits(tmp_path, vocab_size, dtype):
    ids = np.array([0, 5, vocab_size - 1])
    write_shard(tmp_path / 'x.bin', iter([ids[:1], ids[1:]]), Vocabulary(vocab_size))
    info = read_header(tmp_path / 'x.bin', Vocabulary(vocab_size))
    tokens = Tokens([info])
    assert tokens.dtype == tokens[:].dtype == np.dtype(dtype)
    assert not tokens[:].flags.writeable
    np.testing.assert_array_equal(tokens[:], ids)
    assert (info.tokens, info.vocab_size, info.tokenizer_fingerprint) == (3, vocab_size, PRINT)


def test_file_is_little_endian_after_a_header_of_128_bytes(shard):
    content = shard.read_bytes()
    payload = b'\x01\x00\x07\x00\x2b\x01'
    assert content[:16] == b'GPTJAXTK\x02\x00\x00\x00\x02\x00\x00\x00'
    assert content[16:40] == b''.join(number.to_bytes(8, 'little') for number in (3, 1, 300))
    assert content[40:72] == bytes.fromhex(PRINT)
    assert content[72:104] == hashlib.sha256(payload).digest()
    assert content[104:128] == bytes(24)
    assert content[128:] == payload


@pytest.mark.parametrize('field', FIELDS)
def test_every_damaged_header_field_is_refused_by_name(shard, field):
    content = bytearray(shard.read_bytes())
    content[FIELDS[field]] ^= 0x06
    shard.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(shard, Vocabulary())
    assert str(caught.value).startswith(f'{shard}: ')
    assert 'delete it' in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('length', [0, 5, 8, HEADER.size - 1, HEADER.size, HEADER.size + 5])
def test_truncated_file_is_refused_by_name(shard, length):
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(InputError, match=r'train\.bin: .*delete it'):
        read_header(shard)


def test_file_with_bytes_after_its_tokens_is_refused(shard):
    shard.write_bytes(shard.read_bytes() + b'\x00')
    with pytest.raises(InputError, match='135 bytes where 3 tokens take 134'):
        read_header(shard)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r'none\.bin'):
        read_header(tmp_path / 'none.bin')


@pytest.mark.parametrize('other', [Vocabulary(fingerprint='cd' * 32), Vocabulary(301)])
def test_another_tokenizer_is_refused_only_where_asked(shard, other):
    assert read_header(shard).tokens == 3
    with pytest.raises(InputError, match='another tokenizer'):
        read_header(shard, other)


@pytest.mark.parametrize('place', [72, HEADER.size, -1])
def test_a_flipped_bit_of_the_tokens_or_their_sum_is_found_by_verifying(shard, place):
    verify_shard(read_header(shard))
    content = bytearray(shard.read_bytes())
    content[place] ^= 0x01
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r'train\.bin: damaged, the sha256'):
        verify_shard(read_header(shard))


def test_failure_in_the_middle_keeps_the_old_file_and_leaves_no_other(shard):
    before = shard.read_bytes()

    def chunks():
        yield [1, 2, 3]
        raise RuntimeError('disk on fire')

    with pytest.raises(RuntimeError, match='on fire'):
        write_shard(shard, chunks(), Vocabulary())
    assert shard.read_bytes() == before
    assert list(shard.parent.iterdir()) == [shard]


@pytest.mark.parametrize('ids', [[300], [-1], []])
def test_ids_outside_of_the_vocabulary_and_empty_shards_are_refused(tmp_path, ids):
    with pytest.raises(ValueError, match=r'x\.bin'):
        write_shard(tmp_path / 'x.bin', [ids], Vocabulary())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """Shards of 1, 5, 2 and 4 tokens that hold 0 to 11."""
    folder = tmp_path_factory.mktemp('many')
    ids = np.split(np.arange(12), [1, 6, 8])
    return [write_shard(folder / f'{number}.bin', [part], Vocabulary()) for number, part in enumerate(ids)]


@given(st.integers(-15, 15) | st.none(), st.integers(-15, 15) | st.none())
def test_many_shards_are_sliced_like_one_array(many, start, stop):
    tokens = Tokens(many)
    assert len(tokens) == 12
    np.testing.assert_array_equal(tokens[start:stop], np.arange(12)[start:stop])
    assert tokens[start:stop].dtype == tokens.dtype


def test_single_tokens_and_the_whole_array_can_be_had(many):
    tokens = Tokens(many)
    assert [tokens[place] for place in (0, 1, 7, 11, -1, -12)] == [0, 1, 7, 11, 11, 0]
    assert np.asarray(tokens).tolist() == list(range(12))
    assert tokens.documents == 1  # 7 is the end of text
    for place in (12, -13):
        with pytest.raises(IndexError):
            tokens[place]
    with pytest.raises(IndexError, match='step 2'):
        tokens[::2]


def test_only_the_shards_that_are_read_are_opened(many, monkeypatch):
    opened = []
    monkeypatch.setattr('builtins.open', lambda path, *args, real=open: opened.append(path) or real(path, *args))
    tokens = Tokens(many)
    assert opened == []
    assert tokens[2:4].base is not None  # a view
    assert tokens[5:7].tolist() == [5, 6]
    assert opened == [many[1].path, many[2].path]
