"""Flags of generate and evaluate that cannot be meant: one line that names them, before a checkpoint is looked for."""

import pytest

NOWHERE = '--checkpoint=/no/such/checkpoint'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--checkpoint='], '--checkpoint= is empty; give the --workdir of a training run'),
        ([NOWHERE, '--prompt_file='], '--prompt_file= is empty; give a text file'),
        ([NOWHERE, '--draft_checkpoint='], '--draft_checkpoint= is empty'),
        ([NOWHERE, '--bad_words='], '--bad_words= is empty; give a word'),
        ([NOWHERE, '--bad_words=a', '--bad_words='], '--bad_words= is empty'),
        ([NOWHERE, '--mesh='], '--mesh= is empty'),
        ([NOWHERE, '--stop='], "stop='' is in every text"),
        ([NOWHERE, '--min_new_tokens=50', '--max_new_tokens=5'], 'min_new_tokens=50 exceeds max_new_tokens=5'),
        ([NOWHERE, '--min_new_tokens=-1'], 'min_new_tokens=-1 must be at least 1, or 0'),
        ([NOWHERE, '--max_new_tokens=0'], 'max_new_tokens=0 must be at least 1'),
        ([NOWHERE, '--max_new_tokens=1000000000000'], 'max_new_tokens=1000000000000 must be at most 2147483647'),
        ([NOWHERE, '--num_samples=1e9'], '--num_samples=1e9'),
        ([NOWHERE, '--num_samples=100000000000'], 'num_samples=100000000000 must be at most'),
        ([NOWHERE, '--seed=-1'], 'seed=-1 must be at least 0'),
        ([NOWHERE, '--seed=4294967296'], 'seed=4294967296 must be at most 4294967295'),
        ([NOWHERE, '--seed=18446744073709551616'], 'seed=18446744073709551616 must be at most'),
        ([NOWHERE, '--temperature=nan'], 'temperature=nan must be above 0'),
        ([NOWHERE, '--top_p=2'], 'top_p=2.0 must be above 0 and at most 1'),
        ([NOWHERE, '--min_p=nan'], 'min_p=nan'),
        ([NOWHERE, '--repetition_penalty=inf'], 'repetition_penalty=inf'),
        ([NOWHERE, '--strategy=greedy', '--temperature=0.5'], '--temperature=0.5 does not go with --strategy=greedy'),
        ([NOWHERE, '--strategy=greedy', '--top_k=5'], '--top_k=5 does not go with --strategy=greedy'),
        ([NOWHERE, '--strategy=greedy', '--best_of=2'], '--best_of=2 does not go with --strategy=greedy'),
        ([NOWHERE, '--best_of=-1'], 'best_of=-1 is less than --num_samples=1; leave it out'),
        ([NOWHERE, '--best_of=2', '--num_samples=3'], '--best_of=2 is less than --num_samples=3'),
        ([NOWHERE, '--strategy=beam', '--num_beams=100000'], 'num_beams=100000 must be at most 4096'),
        ([NOWHERE, '--strategy=beam', '--num_samples=5'], '--num_samples=5 exceeds --num_beams=4'),
        ([NOWHERE, '--strategy=beam', '--stop=x'], 'stop strings do not go with beam search'),
        ([NOWHERE, '--strategy=beam', '--allow_sliding'], 'allow_sliding does not go with beam search'),
        ([NOWHERE, '--strategy=contrastive', '--penalty_alpha=2'], 'penalty_alpha=2.0 must be from 0 to 1'),
        ([NOWHERE, '--prompt_lookup=-1'], 'prompt_lookup=-1 must be at least 1'),
        ([NOWHERE, '--prompt_lookup=1000000'], 'prompt_lookup=1000000 must be at most 64'),
        ([NOWHERE, '--prompt_lookup=1', '--draft_tokens=1000000'], 'draft_tokens=1000000 must be at most 1024'),
        ([NOWHERE, '--draft_tokens=3'], '--draft_tokens=3 without anything to draft from'),
        ([NOWHERE, '--draft_checkpoint=x', '--allow_sliding'], 'allow_sliding does not go with speculative'),
    ],
)
def test_a_flag_of_generate_that_cannot_be_meant_is_named(refused, arguments, message):
    assert message in refused('generate', *arguments, *([] if '--prompt_file=' in arguments else ['--prompt=a']))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--checkpoint=', '--text=x'], '--checkpoint= is empty; give the --workdir of a training run'),
        ([NOWHERE, '--text='], '--text= is empty; give a text file, or -'),
        ([NOWHERE, '--text=x', '--stride=-1'], '--stride=-1 must be at least 1'),
        ([NOWHERE, '--text=x', '--stride=9', '--context=8'], '--stride=9 exceeds --context=8'),
        ([NOWHERE, '--text=x', '--batch_size=1000000000000'], '--batch_size=1000000000000 must be at most'),
    ],
)
def test_a_flag_of_evaluate_that_cannot_be_meant_is_named(refused, arguments, message):
    assert message in refused('evaluate', *arguments)
