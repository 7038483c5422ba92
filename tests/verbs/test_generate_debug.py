"""`generate --debug` as a user has it: over a pipe, and in a terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

from gpt_jax.inference import Engine, Sampling, StoppingCriteria, generate

SCRIPT = 'step\nlens\nback\nforce "fox"\nattention 1 0 PNG\nrun 4\nhistory\nnonsense\ntext\nquit\nstep\n'


@pytest.fixture
def checkpoint(finished_run):
    return f'--checkpoint={finished_run.workdir}'


def test_a_script_on_standard_input_is_played(process, checkpoint, finished_run, tmp_path):
    script = SCRIPT.replace('PNG', str(tmp_path / 'map.png'))
    result = process(
        'generate', checkpoint, '--debug', '--prompt=the ', '--strategy=greedy', '--max_new_tokens=9', stdin=script
    )
    assert (result.returncode, result.stderr) == (0, '')
    lines = result.stdout.splitlines()
    # Each command is told of before what it shows, and nothing comes after the last.
    assert [line.removeprefix('(debug) ') for line in lines if line.startswith('(debug) ')] == script.split('\n')[:-2]
    assert lines[1] == "token 0 of the text, after 4 tokens: 'the '"
    assert 'logit lens: the final LayerNorm and the output head after every layer' in lines
    assert "error: 'nonsense' is no command; help lists them" in lines
    assert f'written: {tmp_path / "map.png"}' in lines
    assert (tmp_path / 'map.png').read_bytes().startswith(b'\x89PNG')
    engine = Engine(finished_run.model, finished_run.params)
    tokenizer = finished_run.tokenizer
    stopping = StoppingCriteria(4, tokenizer.end_of_text)
    ((expected,),) = generate(engine, [tokenizer.encode('the fox')], Sampling(greedy=True), stopping)
    assert f'the fox{tokenizer.decode(expected.tokens)}' in result.stdout.partition('(debug) text\n')[2]
    assert '\x1b' not in result.stdout


@pytest.mark.slow
def test_a_terminal_is_prompted_and_gets_colours(checkpoint):
    ours, theirs = pty.openpty()
    command = [sys.executable, '-m', 'gpt_jax.generate', checkpoint, '--debug', '--prompt=the ', '--top_k=3']
    environment = os.environ | {'XLA_FLAGS': '', 'TERM': 'xterm-256color', 'COLUMNS': '120'}
    environment.pop('NO_COLOR', None)
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        shown = b''
        try:
            while chunk := os.read(ours, 4096):
                asked = shown.count(b'(debug) ')
                shown += chunk
                if asked < shown.count(b'(debug) '):
                    os.write(ours, b'top 2\n' if asked == 0 else b'\x04')  # Ctrl-D at last
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(ours)
        assert child.wait() == 0
    assert re.search(rb'\x1b\[1;32m>', shown)
    assert b'top_k=3' in shown
    assert b'Traceback' not in shown


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], '--debug takes commands from standard input; give the text by --prompt or --prompt_file'),
        (['--interactive'], '--debug and --interactive exclude each other'),
        (['--prompt=a', '--json'], '--debug and --json exclude each other'),
        (['--prompt=a', '--num_samples=2'], '--debug and --num_samples exclude each other'),
        (['--prompt=a', '--best_of=2'], '--debug and --best_of exclude each other'),
        (['--prompt=a', '--strategy=beam'], '--debug takes one token after another; --strategy=beam does not'),
        (['--prompt=a', '--strategy=contrastive'], '--strategy=contrastive does not: use sample'),
        (['--prompt=' + 'a' * 32], 'the prompt has 32 tokens and the model sees block_size=32 in all'),
        (['--prompt=a', '--max_new_tokens=0'], 'max_new_tokens=0 must be at least 1'),
    ],
)
def test_what_does_not_go_with_it_is_one_line(refused, checkpoint, arguments, message):
    assert message in refused('generate', checkpoint, '--debug', *arguments)


def test_several_prompts_are_refused(refused, checkpoint, tmp_path):
    (tmp_path / 'prompts.txt').write_text('a\nb\n', encoding='utf-8')
    message = refused('generate', checkpoint, '--debug', f'--prompt_file={tmp_path / "prompts.txt"}')
    assert message == '--debug takes one prompt, and there are 2; --noprompt_lines joins lines'
