"""--weights=ema of the verbs that read a checkpoint."""

import json

import jax
import numpy as np
import pytest

from gpt_jax.checkpoints import Checkpoints, load
from gpt_jax.evaluation import model_losses, strided_losses
from gpt_jax.models import huggingface

TEXT = 'the quick brown fox jumps over a dog\n'


@pytest.fixture(scope='module')
def averaged(finished_run, tmp_path_factory):
    """A workdir whose checkpoint has an average, and that average: half the parameters."""
    workdir = tmp_path_factory.mktemp('averaged')
    average = jax.tree.map(lambda leaf: leaf / 2, finished_run.params)
    with Checkpoints(workdir / 'checkpoints') as checkpoints:
        checkpoints.save(1, finished_run.params, None, load(finished_run.workdir).meta, ema=average)
    return workdir, average


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('generate', ('--checkpoint={}', '--prompt=the')),
        ('evaluate', ('--checkpoint={}', '--text={}/config.json')),
        ('convert', ('--source={}', '--target={}/new')),
    ],
)
def test_a_checkpoint_without_an_average_is_refused_in_one_line(verb, finished_run, name, arguments):
    filled = [argument.format(finished_run.workdir) for argument in arguments]
    status, output, errors = verb(name, *filled, '--weights=ema')
    assert (status, output) == (1, '')
    assert errors.startswith('error: ')
    assert 'holds no average of its parameters' in errors
    assert errors.count('\n') == 1


def test_evaluate_and_convert_take_the_average(verb, averaged, finished_run, tmp_path):
    workdir, average = averaged
    text = tmp_path / 'text.txt'
    text.write_text(TEXT, encoding='utf-8')
    for flags, params in ((['--weights=ema'], average), ([], finished_run.params)):
        status, output, _ = verb('evaluate', f'--checkpoint={workdir}', f'--text={text}', *flags)
        assert status == 0
        losses = strided_losses(model_losses(finished_run.model, params), finished_run.tokenizer.encode(TEXT), 32, 16)
        assert json.loads(output)['loss'] == pytest.approx(losses.mean(dtype=np.float64))
    target = tmp_path / 'converted'
    assert verb('convert', f'--source={workdir}', f'--target={target}', '--weights=ema')[0] == 0
    _, params = huggingface.load(target)
    np.testing.assert_array_equal(params['wpe'], average['wpe'])


def test_a_run_may_begin_with_an_average(averaged, tiny_config):
    from gpt_jax.training.recipe import find_initial_weights

    workdir, average = averaged
    found = find_initial_weights(str(workdir), weights='ema').found
    np.testing.assert_array_equal(load(found).params['wte'], average['wte'])
