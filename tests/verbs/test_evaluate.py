import json
import math
import shutil

import numpy as np
import pytest

from gpt_jax.checkpoints import export_huggingface
from gpt_jax.data.tokenizer import train_char
from gpt_jax.evaluation import model_losses, strided_losses

TEXT = 'the quick brown fox jumps over a dog.\nunder the café a naïve fox sleeps, the dog jumps\n'
KEYS = ['loss', 'perplexity', 'bits_per_byte', 'tokens', 'words', 'bytes', 'stride', 'context']


@pytest.fixture
def checkpoint(finished_run):
    return f'--checkpoint={finished_run.workdir}'


@pytest.fixture
def text(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_text(TEXT, encoding='utf-8')
    return f'--text={path}'


def test_help_names_the_flags_and_exits_0(process):
    result = process('evaluate', '--help')
    assert (result.returncode, result.stderr) == (0, '')
    for flag in ('checkpoint', 'step', 'text', 'stride', 'context', 'batch_size', 'mesh'):
        assert f'  --{flag}: ' in result.stdout


def test_one_json_object_and_nothing_else_is_printed(verb, checkpoint, text, finished_run):
    status, output, errors = verb('evaluate', checkpoint, text)
    # The tiny model's tokenizer has no comma.
    assert (status, errors) == (
        0,
        f"warning: {text} holds characters that the tokenizer does not know, read as its unknown token: ','\n",
    )
    assert output.count('\n') == 1
    numbers = json.loads(output)
    assert list(numbers) == KEYS
    assert (numbers['stride'], numbers['context']) == (16, 32)
    assert (numbers['tokens'], numbers['bytes']) == (len(TEXT) - 1, len(TEXT.encode()) - 1)
    assert numbers['words'] == len(TEXT.split())
    assert numbers['perplexity'] == pytest.approx(math.exp(numbers['loss']))
    losses = strided_losses(
        model_losses(finished_run.model, finished_run.params), finished_run.tokenizer.encode(TEXT), 32, 16
    )
    assert numbers['loss'] == pytest.approx(losses.mean(dtype=np.float64))
    assert numbers['bits_per_byte'] == pytest.approx(losses.sum() / math.log(2) / numbers['bytes'])


def test_flags_reach_the_windows(verb, checkpoint, text):
    def numbers(*arguments):
        return json.loads(verb('evaluate', checkpoint, text, *arguments)[1])

    most = numbers('--stride=1')
    assert (most['stride'], most['context']) == (1, 32)
    assert numbers('--stride=1', '--batch_size=3')['loss'] == pytest.approx(most['loss'], rel=1e-6)
    short = numbers('--context=4')
    assert (short['stride'], short['context']) == (2, 4)
    assert len({most['loss'], short['loss'], numbers()['loss']}) == 3


MESHES = ['data:8', 'fsdp:8', 'fsdp:-1,tensor:2', 'data:2,fsdp:2,tensor:2']


def test_the_numbers_are_the_same_on_any_mesh(verb, checkpoint, text):
    one = json.loads(verb('evaluate', checkpoint, text)[1])
    for mesh in MESHES:
        numbers = json.loads(verb('evaluate', checkpoint, text, f'--mesh={mesh}', '--batch_size=3')[1])
        assert numbers == pytest.approx(one, rel=1e-5), mesh


@pytest.mark.parametrize(
    ('mesh', 'message'),
    [
        (
            'fsdp',
            "--mesh=fsdp: 'fsdp' is not a new axis with its number of devices; write it as --mesh=fsdp:8,tensor:2",
        ),
        (
            'fsdp:3',
            '--mesh=fsdp:3: mesh.data=1, mesh.fsdp=3, mesh.tensor=1, mesh.context=1 does not divide the 8 devices',
        ),
        (
            'fsdp:4,context:2',
            '--mesh=fsdp:4,context:2: context splits the tokens of a text over devices, which training alone does',
        ),
        ('tensor:8', 'mesh.tensor=8 does not divide a dimension of 2 in'),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(refused, checkpoint, text, mesh, message):
    assert message in refused('evaluate', checkpoint, text, f'--mesh={mesh}')


def test_standard_input_is_the_same_as_a_file(process, checkpoint, text):
    piped, read = process('evaluate', checkpoint, '--text=-', stdin=TEXT), process('evaluate', checkpoint, text)
    assert (piped.returncode, piped.stdout) == (read.returncode, read.stdout)
    assert list(json.loads(piped.stdout)) == KEYS


def test_a_hugging_face_directory_is_scored_like_the_checkpoint_it_was_made_from(
    verb, checkpoint, text, finished_run, tmp_path
):
    export_huggingface(finished_run.workdir, tmp_path / 'hf')
    ours, theirs = (json.loads(verb('evaluate', each, text)[1]) for each in (checkpoint, f'--checkpoint={tmp_path}/hf'))
    assert theirs.pop('loss') == pytest.approx(ours.pop('loss'), rel=1e-6)
    for name in ('perplexity', 'bits_per_byte'):
        assert theirs.pop(name) == pytest.approx(ours.pop(name), rel=1e-5)
    assert theirs == ours


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--stride=0'], 'stride=0 must be at least 1'),
        (['--stride=33'], '--stride=33 must be at most context=32'),
        (['--context=33'], '--context=33 exceeds block_size=32'),
        (['--context=0'], 'context=0 must be at least 1'),
        (['--batch_size=0'], 'batch_size=0 must be at least 1'),
        (['--step=5'], 'has no checkpoint of step 5: it has 6'),
        (['--strid=5'], "Unknown command line flag 'strid'"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_1(refused, checkpoint, text, arguments, message):
    assert message in refused('evaluate', checkpoint, text, *arguments)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is empty; name a file with text in it'),
        (b'a', 'the text has 1 tokens, and the first is never scored'),
        (b'abc\xff', 'is not UTF-8 (byte 0xff in line 1, at offset 3); convert it'),
        (b'ab\xc3', 'is not UTF-8 (byte 0xc3 in line 1, at offset 2)'),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_line(refused, checkpoint, tmp_path, content, message):
    (tmp_path / 'text.txt').write_bytes(content)
    assert message in refused('evaluate', checkpoint, f'--text={tmp_path / "text.txt"}')


def test_what_is_not_there_is_named(refused, checkpoint, text, tmp_path):
    assert '--checkpoint is missing' in refused('evaluate', text)
    assert '--text is missing; give a text file, or -' in refused('evaluate', checkpoint)
    assert f'--text={tmp_path} is a folder' in refused('evaluate', checkpoint, f'--text={tmp_path}')
    assert 'none.txt cannot be read (No such file' in refused('evaluate', checkpoint, '--text=none.txt')
    assert 'none does not exist' in refused('evaluate', f'--checkpoint={tmp_path / "none"}', text)


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(refused, finished_run, text, tmp_path):
    copy = shutil.copytree(finished_run.workdir, tmp_path / 'run')
    train_char(['other letters']).save(copy / 'tokenizer.json')
    assert 'does not match the checkpoint' in refused('evaluate', f'--checkpoint={copy}', text)
