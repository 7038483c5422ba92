"""The local hub with both suite datasets in small, and a way to run a program against it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from local_hub import LocalHub
from small_datasets import openwebtext_10k, wikitext

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The hub's client reads its settings when it is imported, so each test runs it in a process of its own.
PROGRAM = """
import json, sys, time
from gpt_jax.data import DataConfig, corpus, prepare
from gpt_jax.errors import InputError
result = dict(lines=[], waited=0)
def sleep(seconds, real=time.sleep):  # the client waits before it tries again
    result['waited'] += seconds
    real(0 if {hurry} else seconds)
time.sleep = sleep
corpus.PART_BYTES = {part_bytes}
try:
    data = prepare(DataConfig(**json.loads(sys.argv[1])), log=result['lines'].append)
    (prepared,) = data.prepared.values()
    end = '<|endoftext|>'
    for split in ('train', 'validation'):
        result[split] = prepared.tokenizer.decode(getattr(prepared, split)[:]).split(end)[:-1]
    result.update(fingerprint=prepared.fingerprint, folder=str(prepared.folder))
except InputError as error:
    result['error'] = str(error)
print(json.dumps(result))
"""


@pytest.fixture
def hub():
    """A running hub."""
    with LocalHub({'stas/openwebtext-10k': openwebtext_10k(), 'Salesforce/wikitext': wikitext()}).running() as hub:
        yield hub


@pytest.fixture
def environment(hub, one_device, tmp_path):
    """Of a process that takes the local hub for the real one, with a cache of its own."""
    ours = {
        'HF_ENDPOINT': hub.url,
        'HF_HOME': str(tmp_path / 'hf'),
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'USE_TORCH': '0',  # `datasets` imports it where it is installed, which takes seconds
        'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]),
    }
    return {name: value for name, value in os.environ.items() if name != 'HF_HUB_OFFLINE'} | one_device | ours


@pytest.fixture
def run_prepare(environment, tmp_path):
    """A function: keys of the data section -> what came of preparing them, as PROGRAM prints it."""

    def run(corpus, hurry=False, part_bytes=2**26, **keys):
        config = {'corpus': corpus, 'vocab_size': 300, 'cache_dir': str(tmp_path / 'data')} | keys
        command = [
            sys.executable,
            '-c',
            PROGRAM.replace('{hurry}', str(hurry)).replace('{part_bytes}', str(part_bytes)),
            json.dumps(config),
        ]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        return json.loads(result.stdout.splitlines()[-1])

    return run
