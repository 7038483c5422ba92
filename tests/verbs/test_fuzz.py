"""Whatever stands on a command line or in a file: the verb does its work, or says in one line why not.

Two thousand draws. A run is stopped before its first step and a text is a few tokens long; what they do then has tests
of its own. A draw that fails is a bug, and hypothesis prints the command that shows it.
"""

import json
import re
import sys

import pytest
from absl import flags
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gpt_jax.config import FIELDS
from gpt_jax.errors import InputError

pytestmark = pytest.mark.slow


def draws(count):
    """Hypothesis settings of so many draws; a verb that is compiled for the first time may take its time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


NUMBERS = [
    *('0', '-1', '1', '2', '3', '7', '0.5', '-0.5', '1e-46', '1e9', '-1e9', '1e39', '1e400', 'nan', 'inf', '-inf'),
    *('2147483647', '2147483648', '4294967296', '18446744073709551616', '9' * 30, '0x10', '1_000', '٣', '1,5', ' 1'),
]
TEXTS = [
    *('', ' ', 'None', 'True', 'false', 'x', 'é', '\udcff', 'a\nb', '\t', '%s', '{0}', '[', '{}', '*', '?', '#', '-'),
    *('--', "'", '"', '$HOME', '~nobody/x', 'a' * 300, 'a,b', 'a:b', 'a:0.5', ':', ',', '/', '.', '..', '/dev/null'),
    *('/dev/zero', '/proc/self/mem', 'az://bucket/x', 'hub:', 'hub:a', 'file:///x', 'char', 'bpe', 'gpt2', 'fsdp:2'),
]
VALUES = st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=6).filter(lambda text: '\0' not in text)


@pytest.fixture
def told(verb, capfd):
    """A function: verb, arguments -> its exit status, which is 0, or 1 with one line of error."""

    def run(name, *arguments):
        status, _, errors = verb(name, *arguments)
        lines = [line for line in errors.splitlines() if line.startswith('error: ')]
        assert 'Traceback' not in errors, errors
        assert status in (0, 1), (status, errors)
        assert len(lines) == status, errors
        assert not status or (errors.endswith(f'{lines[0]}\n') and len(lines[0]) < 2000), errors
        return status

    return run


@pytest.fixture
def before_the_first_step(monkeypatch):
    """Ends a run where its first state would be made: all is read and checked by then."""
    from gpt_jax.training.trainer import Trainer

    def first_state(self):
        raise InputError('enough')

    monkeypatch.setattr(Trainer, 'first_state', first_state)


# A key gets values of its own type most of the time.
CHANGES = st.sampled_from(FIELDS).flatmap(
    lambda key: st.tuples(
        st.just(f'{key[0]}.{key[1]}'), st.sampled_from(TEXTS if 'str' in str(key[2].type) else NUMBERS) | VALUES
    )
)


@draws(700)
@given(changes=st.lists(CHANGES, min_size=1, max_size=3).map(dict), name=st.sampled_from(['main', 'main', 'plan']))
def test_keys(told, experiment, before_the_first_step, tmp_path_factory, changes, name):
    # Elsewhere than in the tests' own folders nothing may be written.
    assume(not any(key in changes for key in ('data.cache_dir',)))
    workdir = [f'--workdir={tmp_path_factory.mktemp("fuzz") / "run"}'] if name == 'main' else []
    told(name, f'--config={experiment}', *workdir, *(f'--config.{key}={value}' for key, value in changes.items()))


GENERATE_FLAGS = """
    step prompt prompt_file prompt_lines max_new_tokens stop allow_sliding num_samples batch_size seed cache_dtype mesh
    json echo strategy repetition_penalty no_repeat_ngram_size bad_words min_new_tokens temperature top_k top_p min_p
    typical_p best_of num_beams length_penalty early_stopping num_beam_groups diversity_penalty penalty_alpha
    draft_checkpoint prompt_lookup draft_tokens parse_special weights
"""
FLAGS_OF = {
    'generate': re.findall(r'\w+', GENERATE_FLAGS),
    'evaluate': ['step', 'text', 'context', 'stride', 'batch_size', 'mesh', 'parse_special', 'weights'],
}


@draws(450)
@given(data=st.data(), name=st.sampled_from(['generate', 'generate', 'evaluate']))
def test_flags(told, finished_run, data, name):
    changes = data.draw(st.dictionaries(st.sampled_from(FLAGS_OF[name]), VALUES, min_size=1, max_size=3))
    own = {'prompt': 'the quick', 'max_new_tokens': '3'} if name == 'generate' else {}
    if 'prompt_file' in changes:
        del own['prompt']
    arguments = [f'--{flag}={value}' for flag, value in (own | changes).items()]
    told(name, f'--checkpoint={finished_run.workdir}', *arguments)


def test_every_flag_of_a_verb_is_drawn(verb):
    for name, drawn in FLAGS_OF.items():
        _, output, _ = verb(name, '--help')
        defined = set(re.findall(r'^  --(\w+):', output, re.MULTILINE))
        assert set(drawn) == defined - {'checkpoint', 'interactive', 'debug', 'config', 'data', 'help_config'}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LINES = st.lists(
    st.text(max_size=30).map(str.encode)
    | st.fixed_dictionaries({'text': st.text(max_size=30)}).map(lambda row: json.dumps(row).encode())
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=20),
    max_size=30,
).map(b'\n'.join)
STARTS = st.sampled_from(
    [
        b'',
        b'',
        b'\xef\xbb\xbf',
        b'\xff\xfe',
        b'\x1f\x8b',
        b'\x28\xb5\x2f\xfd',
        b'PAR1',
        b'version https://git-lfs.github.com/spec/v1\n',
    ]
)
ENDINGS = ['txt', 'jsonl', 'JSONL', 'ndjson', 'json', 'txt.gz', 'jsonl.gz', 'jsonl.zst', 'parquet', 'md', 'py', 'bin']


@draws(500)
@given(
    content=st.builds(bytes.__add__, STARTS, LINES),
    ending=st.sampled_from(ENDINGS),
    tokenizer=st.sampled_from(['char', 'char', 'bpe']),
    documents=st.sampled_from(['whole', 'file', 'block']),
)
def test_corpora(told, tmp_path_factory, content, ending, tokenizer, documents):
    folder = tmp_path_factory.mktemp('fuzz')
    (folder / f'corpus.{ending}').write_bytes(content)
    arguments = {'path': folder / f'corpus.{ending}', 'tokenizer': tokenizer, 'documents': documents}
    arguments |= {'cache_dir': folder / 'cache', 'num_workers': 1}
    if tokenizer == 'bpe':
        arguments['vocab_size'] = 260
    told('prepare', '--config=configs/smoke.py', *(f'--config.data.{key}={value}' for key, value in arguments.items()))


@draws(150)
@given(content=st.builds(bytes.__add__, STARTS, LINES), name=st.sampled_from(['text', 'prompt_file']))
def test_prompts_and_texts(told, finished_run, tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp('fuzz') / 'text'
    path.write_bytes(content)
    if name == 'text':
        told('evaluate', f'--checkpoint={finished_run.workdir}', f'--text={path}')
    else:
        told('generate', f'--checkpoint={finished_run.workdir}', f'--prompt_file={path}', '--max_new_tokens=1')


WORDS = [
    'config',
    'base()',
    'train',
    'steps',
    '=',
    '.',
    '(',
    ')',
    'return',
    'None',
    '1',
    "'x'",
    ':',
    '\n    ',
    '[',
    ']',
    '-',
]


@draws(200)
@given(code=st.lists(st.sampled_from(WORDS), max_size=12).map(' '.join))
def test_experiment_files(told, monkeypatch, tmp_path_factory, code):
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)
    path = tmp_path_factory.mktemp('fuzz') / 'experiment.py'
    path.write_text(
        f'from gpt_jax.config import base\ndef get_config():\n    config = base()\n    {code}\n    return config\n'
    )
    told('plan', f'--config={path}')
    assert not flags.FLAGS.is_parsed()
