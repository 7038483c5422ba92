"""The local hub with both suite datasets in small, and a way to run a program against it."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from local_hub import Dataset, LocalHub

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The hub's client reads its settings when it is imported, so each test runs it in a process of its own.
PROGRAM = """
import json, sys, time
from gpt_jax.data import DataConfig, prepare
from gpt_jax.errors import InputError
result = dict(lines=[])
start = time.perf_counter()
if {hurry}:
    time.sleep = lambda seconds: None  # the client waits before it tries again
try:
    prepared = prepare(DataConfig(**json.loads(sys.argv[1])), log=result['lines'].append)
    end = '<|endoftext|>'
    for split in ('train', 'validation'):
        result[split] = prepared.tokenizer.decode(getattr(prepared, split)[:]).split(end)[:-1]
    result.update(fingerprint=prepared.fingerprint, folder=str(prepared.folder))
except InputError as error:
    result['error'] = str(error)
result['seconds'] = time.perf_counter() - start
print(json.dumps(result))
"""


def parquet(texts, rows=100, column='text'):
    """A parquet file of row groups of some rows, with a column that nobody reads before the text."""
    file = io.BytesIO()
    table = pyarrow.table({'id': list(range(len(texts))), column: texts})
    pyarrow.parquet.write_table(table, file, row_group_size=rows)
    return file.getvalue()


def words(n):
    return ' '.join(f'word{(n * k) % 97}' for k in range(1, 30))


WEB = [f'Document {n}: {words(n)}.\n\nIt has two paragraphs.' for n in range(400)]


def article_lines(name):
    lines = ['', f' = {name} = \n', '', f' {name} is the first line of its article . \n', '', ' = = Section = = \n', '']
    return [*lines, ' = 1 = 2 = \n', f' {words(len(name))} . \n', '']


def wikitext():
    """Three files as Salesforce/wikitext has them; an article goes on in the second."""
    train = [line for name in ('Anarchism', 'Boulter', 'Carp', 'Dollar') for line in article_lines(name)]
    folder = 'wikitext-103-raw-v1'
    files = {
        f'{folder}/train-00000-of-00002.parquet': parquet(train[:14], 5),
        f'{folder}/train-00001-of-00002.parquet': parquet(train[14:], 5),
        f'{folder}/validation-00000-of-00001.parquet': parquet(article_lines('Held out'), 5),
        f'{folder}/test-00000-of-00001.parquet': parquet(article_lines('Never read'), 5),
    }
    files['wikitext-2-v1/train-00000-of-00001.parquet'] = parquet(article_lines('Another config'))
    configs = [
        {
            'config_name': name,
            'data_files': [{'split': split, 'path': f'{name}/{split}-*'} for split in splits],
        }
        for name, splits in (('wikitext-2-v1', ['train']), (folder, ['train', 'validation', 'test']))
    ]
    return Dataset({'main': {'README.md': _card(configs), **files}}, {'configs': configs})


def _card(configs):
    return f'---\nconfigs: {json.dumps(configs)}\n---\n'.encode()


@pytest.fixture
def hub():
    """A running hub."""
    script = {'README.md': b'---\nlicense: mit\n---\n', 'openwebtext-10k.py': b'raise SystemExit'}
    converted = {'plain_text/train/0000.parquet': parquet(WEB)}
    web = Dataset({'main': script, 'refs/convert/parquet': converted})
    with LocalHub({'stas/openwebtext-10k': web, 'Salesforce/wikitext': wikitext()}).running() as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path):
    """Of a process that takes the local hub for the real one, with a cache of its own."""
    ours = {
        'HF_ENDPOINT': hub.url,
        'HF_HOME': str(tmp_path / 'hf'),
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
        'XLA_FLAGS': '--xla_backend_optimization_level=0',  # and one device
    }
    return {name: value for name, value in os.environ.items() if name != 'HF_HUB_OFFLINE'} | ours


@pytest.fixture
def run_prepare(environment, tmp_path):
    """A function: keys of the data section -> what came of preparing them, as PROGRAM prints it."""

    def run(corpus, hurry=False, **keys):
        config = {'corpus': corpus, 'vocab_size': 300, 'cache_dir': str(tmp_path / 'data')} | keys
        command = [sys.executable, '-c', PROGRAM.replace('{hurry}', str(hurry)), json.dumps(config)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(result.stdout.splitlines()[-1])

    return run
