import numpy as np
import pytest

from gpt_jax.data import open_shard, write_shard
from gpt_jax.data.shards import HEADER
from gpt_jax.errors import InputError

PRINT = 'ab' * 32
FIELDS = {'magic': 0, 'version': 8, 'dtype': 12, 'count': 16, 'vocab_size': 24, 'fingerprint': 32}


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / 'train.bin'
    assert write_shard(path, [[1, 2], [], np.array([299])], 300, PRINT) == 3
    return path


@pytest.mark.parametrize(('vocab_size', 'dtype'), [(65536, '<u2'), (65537, '<u4')])
def test_tokens_come_back_in_the_smallest_dtype_that_fits(tmp_path, vocab_size, dtype):
    ids = np.array([0, 5, vocab_size - 1])
    write_shard(tmp_path / 'x.bin', iter([ids[:1], ids[1:]]), vocab_size, PRINT)
    shard = open_shard(tmp_path / 'x.bin', PRINT, vocab_size)
    assert shard.dtype == np.dtype(dtype)
    assert isinstance(shard.tokens, np.memmap)
    assert not shard.tokens.flags.writeable
    np.testing.assert_array_equal(shard.tokens, ids)
    assert (len(shard), shard.vocab_size, shard.tokenizer_fingerprint) == (3, vocab_size, PRINT)


def test_file_is_little_endian_after_a_header_of_64_bytes(shard):
    content = shard.read_bytes()
    assert content[:16] == b'GPTJAXTK\x01\x00\x00\x00\x02\x00\x00\x00'
    assert content[16:32] == (3).to_bytes(8, 'little') + (300).to_bytes(8, 'little')
    assert content[32:64] == bytes.fromhex(PRINT)
    assert content[64:] == b'\x01\x00\x02\x00\x2b\x01'


@pytest.mark.parametrize('field', FIELDS)
def test_every_damaged_header_field_is_refused_by_name(shard, field):
    content = bytearray(shard.read_bytes())
    content[FIELDS[field]] ^= 0x06
    shard.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_shard(shard, PRINT, 300)
    assert str(caught.value).startswith(f'{shard}: ')
    assert 'delete it' in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('length', [0, 5, 8, HEADER.size - 1, HEADER.size, HEADER.size + 5])
def test_truncated_file_is_refused_by_name(shard, length):
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(InputError, match=r'train\.bin: .*delete it'):
        open_shard(shard)


def test_file_with_bytes_after_its_tokens_is_refused(shard):
    shard.write_bytes(shard.read_bytes() + b'\x00')
    with pytest.raises(InputError, match='71 bytes where 3 tokens take 70'):
        open_shard(shard)


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r'none\.bin'):
        open_shard(tmp_path / 'none.bin')


def test_another_tokenizer_or_vocabulary_is_refused_only_where_asked(shard):
    assert len(open_shard(shard)) == 3
    with pytest.raises(InputError, match='another tokenizer'):
        open_shard(shard, tokenizer_fingerprint='cd' * 32)
    with pytest.raises(InputError, match='vocabulary of 300, not 301'):
        open_shard(shard, vocab_size=301)


def test_failure_in_the_middle_keeps_the_old_file_and_leaves_no_other(shard):
    before = shard.read_bytes()

    def chunks():
        yield [1, 2, 3]
        raise RuntimeError('disk on fire')

    with pytest.raises(RuntimeError, match='on fire'):
        write_shard(shard, chunks(), 300, PRINT)
    assert shard.read_bytes() == before
    assert list(shard.parent.iterdir()) == [shard]


@pytest.mark.parametrize('ids', [[300], [-1], []])
def test_ids_outside_of_the_vocabulary_and_empty_shards_are_refused(tmp_path, ids):
    with pytest.raises(ValueError, match=r'x\.bin'):
        write_shard(tmp_path / 'x.bin', [ids], 300, PRINT)
    assert not list(tmp_path.iterdir())
