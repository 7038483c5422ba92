import pytest

from gpt_jax.data import DataConfig, prepare
from gpt_jax.data.tokenizer import train_bpe

SAMPLE = 'The quick brown fox jumps over the lazy dog.\nNaïve café, über straße: 42 ÷ 7 = 6.\n\n    def f(x):\n' * 40


@pytest.fixture(scope='session')
def sample_text():
    return SAMPLE


@pytest.fixture(scope='session')
def small_bpe():
    return train_bpe([SAMPLE], 320)


@pytest.fixture(scope='session')
def prepared_docs(tmp_path_factory):
    """The embedded corpus, prepared once for all tests: a cache folder, the result and what was logged."""
    cache = tmp_path_factory.mktemp('cache')
    lines = []
    data = prepare(DataConfig(vocab_size=512, cache_dir=str(cache)), log=lines.append)
    return cache, data.prepared['python_docs'], lines
