"""Runs on several sources and with a document mask, from the configuration to the rows of metrics.jsonl."""

import json
import math

import pytest

from gpt_jax.errors import InputError
from gpt_jax.training import train


@pytest.fixture(scope='module')
def mixture(corpus, tmp_path_factory):
    other = tmp_path_factory.mktemp('other') / 'digits.txt'
    other.write_text('31415 92653 58979 32384\n' * 200)
    data = {'data.mixture': f'{corpus}:0.75,{other}:0.25', 'data.path': None, 'data.mask_documents': True}
    return data | {'schedule.decay_steps': 6}


@pytest.fixture(scope='module')
def mixed_run(tiny_config, mixture, tmp_path_factory):
    return train(tiny_config(mixture), tmp_path_factory.mktemp('runs') / 'mixed')


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_evaluation_gives_the_loss_of_each_source_and_the_weighted_whole(mixed_run, mixture):
    first, second = (part.rpartition(':')[0] for part in mixture['data.mixture'].split(','))
    last = [row for row in rows(mixed_run.workdir) if 'val_loss' in row][-1]
    whole = 0.75 * last[f'val_loss_{first}'] + 0.25 * last[f'val_loss_{second}']
    assert last['val_loss'] == pytest.approx(whole, rel=1e-6)
    assert last['val_loss'] == mixed_run.val_loss
    assert last['val_perplexity'] == pytest.approx(math.exp(whole), rel=1e-6)
    assert last[f'val_loss_{first}'] != last[f'val_loss_{second}']
    assert last['val_bits_per_byte'] > 0


def test_a_mixture_resumes_to_the_rows_of_an_unbroken_run(mixed_run, tiny_config, mixture, tmp_path):
    train(tiny_config(mixture | {'train.steps': 3}), tmp_path)
    train(tiny_config(mixture), tmp_path)
    losses, expected = ([row['loss'] for row in rows(w) if 'loss' in row] for w in (tmp_path, mixed_run.workdir))
    assert losses == expected


def test_other_weights_or_another_mask_are_refused_by_name_on_resuming(mixed_run, tiny_config, mixture):
    for changes in ({'data.mixture': mixture['data.mixture'].replace('0.75', '0.7')}, {'data.mask_documents': False}):
        with pytest.raises(InputError, match=next(iter(changes))):
            train(tiny_config(mixture | changes), mixed_run.workdir)


@pytest.mark.slow
def test_the_document_mask_changes_what_a_run_learns_from(tiny_config, tmp_path):
    text = tmp_path / 'blocks.txt'
    text.write_text('\n\n'.join(f'a{n % 7} b{n % 5} c{n % 3}' for n in range(400)))
    losses = []
    for masked in (False, True):
        changes = {'data.path': str(text), 'data.documents': 'block', 'data.mask_documents': masked, 'train.steps': 3}
        train(tiny_config(changes), tmp_path / str(masked))
        losses.append([row['loss'] for row in rows(tmp_path / str(masked)) if 'loss' in row])
    assert losses[0] != losses[1]
