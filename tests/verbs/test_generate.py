import json
import shutil

import pytest

from gpt_jax.data.tokenizer import train_char


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


def test_several_samples_have_a_heading_each(verb, checkpoint):
    _, output, _ = verb('generate', checkpoint, '--prompt=fox', '--num_samples=2', '--max_new_tokens=3')
    assert output.startswith('--- sample 1 of 2 ---\nfox')
    assert '\n--- sample 2 of 2 ---\nfox' in output


def test_greedy_is_the_same_whatever_the_seed(verb, checkpoint):
    outputs = {
        verb('generate', checkpoint, '--prompt=a', '--strategy=greedy', f'--seed={seed}', '--temperature=9')[1]
        for seed in (0, 1)
    }
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
