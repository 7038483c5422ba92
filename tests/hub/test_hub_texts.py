"""Texts of the hub: separators and byte order marks in plain text, columns of any type, caches of any name."""

import io
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from local_hub import Dataset

# All cases in one process: `datasets` takes seconds to import.
PROGRAM = """
import json, sys
from gpt_jax.data import DataConfig, load_corpus
from gpt_jax.errors import InputError
for keys in json.loads(sys.argv[1]):
    try:
        corpus = load_corpus(DataConfig(**keys)).resolve()
        texts = []
        for part in corpus.parts():
            corpus.fetch(part)
            texts += [passage.text for passage in corpus.read(part, corpus.decoder())]
        print(json.dumps([texts, corpus.fingerprint, list(corpus.notices(['<|endoftext|>']))]))
    except InputError as error:
        print(json.dumps([str(error), None, []]))
"""
END = '<|endoftext|>'
MARK = b'\xef\xbb\xbf'
TEXTS = ['one', 'zwei\nlines é', 'three']


def columns():
    file = io.BytesIO()
    text = pyarrow.array(TEXTS)
    table = {'text': text.dictionary_encode(), 'view': text.cast(pyarrow.string_view()), 'bytes': text.cast('binary')}
    pyarrow.parquet.write_table(pyarrow.table(table | {'number': [1, 2, 3]}), file, row_group_size=2)
    return file.getvalue()


DATASETS = {
    'me/cut': {'train.txt': MARK + f'one{END}zwei\nlines é{END}{END}three'.encode()},
    'me/lines': {'train.txt': MARK + b'one\nzwei\n'},
    'me/json': {'train.jsonl': MARK + b'{"text": "one"}\n{"text": "zwei"}\n'},
    'me/csv': {'train.csv': MARK + b'text\none\nzwei\n'},
    'me/columns': {'train.parquet': columns()},
    'me/latin': {'train.txt': b'caf\xe9'},
    'me/broken': {'train.jsonl': b'{"text": "one"}\n{"text": '},
}
CASES = {
    'separated': ({'corpus': 'hub:me/cut', 'separator': END}, TEXTS),
    'marked': ({'corpus': 'hub:me/cut'}, [f'one{END}zwei', f'lines é{END}{END}three']),
    'lines': ({'corpus': 'hub:me/lines'}, ['one', 'zwei']),
    'csv': ({'corpus': 'hub:me/csv'}, ['one', 'zwei']),
    'dictionary': ({'corpus': 'hub:me/columns'}, TEXTS),
    'string_view': ({'corpus': 'hub:me/columns', 'column': 'view'}, TEXTS),
    'binary': ({'corpus': 'hub:me/columns', 'column': 'bytes'}, TEXTS),
    'json': ({'corpus': 'hub:me/json'}, ['one', 'zwei']),
    'latin': ({'corpus': 'hub:me/latin'}, 'is damaged, or not what it is called (UnicodeDecodeError'),
    'broken': ({'corpus': 'hub:me/broken'}, 'hub:me/broken'),
    'number': ({'corpus': 'hub:me/columns', 'column': 'number'}, 'of type int64'),
}


@pytest.mark.parametrize(('name', 'streaming'), [('plain', [False, True]), ("a [b] c#d e?f *g 'h $i ü, l:m", [False])])
def test_texts_are_read_whatever_they_and_the_caches_are_called(hub, environment, tmp_path, name, streaming):
    for repo, files in DATASETS.items():
        hub.datasets[repo] = Dataset({'main': files})
    environment = environment | {'HF_HOME': str(tmp_path / name)}
    cases = [(keys | {'streaming': value}, expected) for value in streaming for keys, expected in CASES.values()]
    command = [sys.executable, '-c', PROGRAM, json.dumps([keys for keys, _ in cases])]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    found = [json.loads(line) for line in process.stdout.splitlines()]
    for (texts, _, notices), (keys, expected) in zip(found, cases, strict=True):
        assert expected in texts if isinstance(expected, str) else texts == expected, keys
        assert all(f'at least 3 times {END} in train.txt' in line for line in notices)
        assert bool(notices) == (keys['corpus'] == 'hub:me/cut' and 'separator' not in keys)
    assert found[0][1] != found[1][1]  # the separator is part of the fingerprint
