import contextlib
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest

from gpt_jax.data.tokenizer import train_char

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(finished_run):
    return f'--checkpoint={finished_run.workdir}'


def rows(output):
    return [json.loads(line) for line in output.splitlines()]


def test_help_names_the_flags_and_exits_0(process):
    result = process('generate', '--help')
    assert (result.returncode, result.stderr) == (0, '')
    for flag in ('checkpoint', 'step', 'prompt', 'strategy', 'temperature', 'top_k', 'top_p', 'num_samples', 'seed'):
        assert f'  --{flag}: ' in result.stdout


def test_a_prompt_from_the_flag_is_continued(verb, checkpoint):
    status, output, errors = verb('generate', checkpoint, '--prompt=the quick', '--max_new_tokens=10')
    assert (status, errors) == (0, '')
    assert output.startswith('the quick')
    assert len(output) > len('the quick\n')


def test_a_prompt_from_standard_input_is_the_same_as_from_the_flag(process, checkpoint):
    given = process('generate', checkpoint, '--strategy=greedy', '--prompt=the fox')
    piped = process('generate', checkpoint, '--strategy=greedy', stdin='the fox\n')
    assert (given.returncode, given.stderr) == (piped.returncode, piped.stderr) == (0, '')
    assert given.stdout == piped.stdout
    assert given.stdout.startswith('the fox')


def test_json_is_one_object_a_sample_with_the_keys_of_the_contract(verb, checkpoint, finished_run):
    arguments = ('--prompt=the ', '--max_new_tokens=9', '--num_samples=3', '--json')
    _, output, _ = verb('generate', checkpoint, *arguments)
    samples = rows(output)
    assert len(samples) == 3
    for sample in samples:
        assert list(sample) == ['prompt', 'text', 'tokens', 'logprobs', 'finish_reason']
        assert sample['prompt'] == 'the '
        assert sample['text'] == finished_run.tokenizer.decode(sample['tokens'])
        assert len(sample['logprobs']) == len(sample['tokens']) <= 9
        assert all(logprob <= 0 for logprob in sample['logprobs'])
        assert sample['finish_reason'] == ('length' if len(sample['tokens']) == 9 else 'stop')
    assert len({sample['text'] for sample in samples}) > 1
    assert rows(verb('generate', checkpoint, *arguments)[1]) == samples
    assert rows(verb('generate', checkpoint, *arguments, '--seed=1')[1]) != samples
    (alone,) = rows(verb('generate', checkpoint, *arguments[:2], '--json')[1])
    assert alone['tokens'] == samples[0]['tokens']


@pytest.mark.slow
def test_lines_of_a_file_or_of_standard_input_are_prompts(verb, process, checkpoint, tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('the fox\na\n', encoding='utf-8')
    arguments = (checkpoint, '--max_new_tokens=6', '--json', '--num_samples=2')
    found = rows(verb('generate', *arguments, f'--prompt_file={path}')[1])
    assert [row['prompt'] for row in found] == ['the fox'] * 2 + ['a'] * 2
    piped = rows(process('generate', *arguments, stdin='the fox\na\n').stdout)
    assert [(row['prompt'], row['tokens']) for row in piped] == [(row['prompt'], row['tokens']) for row in found]
    whole = rows(verb('generate', *arguments, f'--prompt_file={path}', '--noprompt_lines')[1])
    assert [row['prompt'] for row in whole] == ['the fox\na'] * 2


def test_draws_do_not_depend_on_how_they_are_batched(verb, checkpoint, tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('the fox\na\nquick brown\n', encoding='utf-8')
    arguments = (checkpoint, '--max_new_tokens=6', '--json', '--num_samples=2', f'--prompt_file={path}')
    found = [rows(verb('generate', *arguments, f'--batch_size={size}')[1]) for size in (1, 4, 8)]
    for others in found[1:]:
        assert [row['tokens'] for row in others] == [row['tokens'] for row in found[0]]


@pytest.mark.slow
def test_a_loop_of_prompts_continues_each_by_itself(process, checkpoint, tmp_path):
    path = tmp_path / 'prompts.txt'
    path.write_text('the fox\na\n', encoding='utf-8')
    arguments = (checkpoint, '--max_new_tokens=6')
    asked = process('generate', *arguments, '--interactive', stdin='the fox\na\n' + 'a' * 40 + '\n')
    given = process('generate', *arguments, f'--prompt_file={path}')
    assert asked.returncode == 0
    # One that is too long is said to be, and the loop goes on.
    assert re.fullmatch(r'error: the prompt has 40 tokens .*\n', asked.stderr)
    assert asked.stdout == re.sub('--- prompt . of 2 ---\n', '', given.stdout)


def test_text_ends_before_a_stop_string(verb, checkpoint):
    arguments = (checkpoint, '--prompt=the ', '--strategy=greedy', '--max_new_tokens=20', '--json')
    (whole,) = rows(verb('generate', *arguments)[1])
    stop = whole['text'][3:5]
    (row,) = rows(verb('generate', *arguments, f'--stop={stop}', '--stop=never there')[1])
    assert row['text'] == whole['text'][: whole['text'].index(stop)]
    assert row['finish_reason'] == 'stop'


def test_a_text_may_outgrow_the_context_where_that_is_allowed(verb, checkpoint):
    arguments = (checkpoint, '--prompt=' + 'the fox ' * 6, '--max_new_tokens=50', '--allow_sliding', '--json')
    (row,) = rows(verb('generate', *arguments)[1])
    assert len(row['tokens']) == 50 or row['finish_reason'] == 'stop'


@pytest.mark.parametrize('source', ['--prompt_lookup=1', '--draft_checkpoint'])
def test_drafts_change_nothing_but_are_counted(verb, checkpoint, source):
    if source == '--draft_checkpoint':
        source = checkpoint.replace('--checkpoint', source)
    arguments = ('generate', checkpoint, '--prompt=the ', '--strategy=greedy', '--max_new_tokens=20')
    _, expected, _ = verb(*arguments)
    status, output, errors = verb(*arguments, source)
    assert (status, output) == (0, expected)
    assert re.fullmatch(r'\d+ of \d+ guessed tokens were accepted \(\d+\.\d%\)\n', errors)


@pytest.mark.slow
def test_a_terminal_sees_tokens_as_they_come_and_is_left_on_a_new_line(checkpoint, one_device):
    # Over a pseudo-terminal, and interrupted by Ctrl-C as soon as something is shown.
    command = [sys.executable, '-m', 'gpt_jax.generate', checkpoint, '--prompt=a\x1b[1m', '--max_new_tokens=100000']
    leader, follower = pty.openpty()
    environment = os.environ | one_device
    process = subprocess.Popen(
        [*command, '--allow_sliding'], cwd=ROOT, env=environment, stdout=follower, stderr=subprocess.PIPE, text=True
    )
    os.close(follower)
    shown = b''
    while len(shown) < 20:
        shown += os.read(leader, 1000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while piece := os.read(leader, 1000):
            shown += piece
    os.close(leader)
    assert process.returncode == 130
    warned, interrupted = errors.splitlines()
    assert warned.startswith('warning: --prompt holds characters that the tokenizer does not know')
    assert interrupted.startswith('interrupted')
    assert shown.startswith(b'a\\x1b[1m')
    assert shown.endswith(b'\r\n')


def test_several_samples_have_a_heading_each(verb, checkpoint):
    _, output, _ = verb('generate', checkpoint, '--prompt=fox', '--num_samples=2', '--max_new_tokens=3')
    assert output.startswith('--- sample 1 of 2 ---\nfox')
    assert '\n--- sample 2 of 2 ---\nfox' in output


def test_greedy_is_the_same_whatever_the_seed(verb, checkpoint):
    outputs = {verb('generate', checkpoint, '--prompt=a', '--strategy=greedy', f'--seed={seed}')[1] for seed in (0, 1)}
    assert len(outputs) == 1


def test_flags_of_sampling_take_effect(verb, checkpoint):
    def text(*arguments):
        return verb('generate', checkpoint, '--prompt=a', '--max_new_tokens=20', *arguments)[1]

    greedy = text('--strategy=greedy')
    assert text('--top_k=1') == text('--top_p=0.000001') == text('--temperature=0.0001') == greedy
    assert text() != greedy


def test_without_a_number_of_new_tokens_it_writes_what_fits(verb, checkpoint):
    (sample,) = rows(verb('generate', checkpoint, '--prompt=' + 'a' * 30, '--strategy=greedy', '--json')[1])
    assert len(sample['tokens']) <= 2
    (sample,) = rows(verb('generate', checkpoint, '--prompt=', '--strategy=greedy', '--json')[1])
    assert 0 < len(sample['tokens']) <= 31


@pytest.mark.parametrize('mesh', ['fsdp:8', 'data:2,fsdp:2,tensor:2'])
def test_a_mesh_writes_the_greedy_text_of_one_device(verb, checkpoint, mesh):
    arguments = ('generate', checkpoint, '--prompt=the ', '--strategy=greedy', '--max_new_tokens=12', '--json')
    (alone,), (split,) = (rows(verb(*arguments, *more)[1]) for more in ([], [f'--mesh={mesh}']))
    assert (split['text'], split['tokens']) == (alone['text'], alone['tokens'])
    assert split['logprobs'] == pytest.approx(alone['logprobs'], abs=1e-4)


def test_a_copied_step_folder_alone_is_enough(verb, checkpoint, finished_run, tmp_path):
    copy = shutil.copytree(finished_run.workdir / 'checkpoints' / '6', tmp_path / 'elsewhere')
    arguments = ('--prompt=the ', '--strategy=greedy', '--json')
    assert verb('generate', f'--checkpoint={copy}', *arguments) == verb('generate', checkpoint, *arguments)


def test_a_step_is_named_by_its_flag(verb, refused, checkpoint, finished_run):
    named = verb('generate', checkpoint, '--step=6', '--prompt=a', '--json')
    assert named == verb('generate', f'--checkpoint={finished_run.workdir}/checkpoints/6', '--prompt=a', '--json')
    assert 'has no checkpoint of step 5: it has 6' in refused('generate', checkpoint, '--step=5', '--prompt=a')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--prompt=' + 'a' * 32], 'the prompt has 32 tokens and the model sees block_size=32'),
        (['--prompt=aaaa', '--max_new_tokens=29'], 'max_new_tokens=29 exceed block_size=32; use max_new_tokens=28'),
        (['--prompt=a', '--max_new_tokens=0'], 'max_new_tokens=0 must be at least 1'),
        (['--prompt=a', '--num_samples=0'], 'num_samples=0 must be at least 1'),
        (['--prompt=a', '--temperature=0'], 'temperature=0.0 must be above 0'),
        (['--prompt=a', '--top_p=2'], 'top_p=2.0'),
        (['--prompt=a', '--top_k=-1'], 'top_k=-1'),
        (['--prompt=a', '--top_k=few'], 'few'),
        (['--prompt=a', '--strategy=best'], 'best'),
        (['--prompt=a', '--tempature=1'], "Unknown command line flag 'tempature'"),
        (['--prompt=a', '--batch_size=0'], 'batch_size=0 must be at least 1'),
        (['--prompt=a', '--strategy=beam', '--top_p=0.5'], '--top_p=0.5 does not go with --strategy=beam'),
        (['--prompt=a', '--num_beams=2'], '--num_beams=2 does not go with --strategy=sample'),
        (['--prompt=a', '--interactive'], '--prompt and --interactive exclude each other'),
        (['--prompt=a', '--stop='], "stop='' is in every text"),
        (['--prompt_file=/none.txt'], '--prompt_file=/none.txt cannot be read'),
        (['--prompt=a', '--mesh=context:8'], '--mesh=context:8: context'),
        (['--prompt=a', '--mesh=fsdp:3'], '--mesh=fsdp:3: '),
        (['--prompt=a', '--best_of=2', '--prompt_lookup=1'], 'best_of=2 does not go with speculative decoding'),
        (['--prompt=a', '--strategy=contrastive', '--num_samples=2'], 'num_samples=2 of a contrastive search'),
        (['a prompt'], "unexpected argument 'a prompt'"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_1(refused, checkpoint, arguments, message):
    assert message in refused('generate', checkpoint, *arguments)


def test_a_checkpoint_that_is_not_there_is_named(refused, tmp_path):
    assert '--checkpoint is missing' in refused('generate', '--prompt=a')
    message = refused('generate', f'--checkpoint={tmp_path / "none"}', '--prompt=a')
    assert f'checkpoint {tmp_path / "none"} does not exist' in message
    assert 'holds no finished checkpoint' in refused('generate', f'--checkpoint={tmp_path}', '--prompt=a')


def test_a_damaged_checkpoint_is_named(refused, finished_run, tmp_path):
    copy = shutil.copytree(finished_run.workdir, tmp_path / 'run')
    damaged = max((copy / 'checkpoints' / '6' / 'params').rglob('*'), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert damaged.name in refused('generate', f'--checkpoint={copy}', '--prompt=a')


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(refused, finished_run, tmp_path):
    copy = shutil.copytree(finished_run.workdir, tmp_path / 'run')
    train_char(['other letters']).save(copy / 'tokenizer.json')
    assert 'does not match the checkpoint' in refused('generate', f'--checkpoint={copy}', '--prompt=a')
