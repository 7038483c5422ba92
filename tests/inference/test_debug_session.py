"""The debugger as a function of states and commands, on a toy whose numbers are known."""

import math

import numpy as np
import pytest
from toy_inspector import VOCAB, ToyInspector, shares_after

from gpt_jax.data.tokenizer import train_char
from gpt_jax.errors import InputError
from gpt_jax.inference import Sampling
from gpt_jax.inference.debug import Debugger
from gpt_jax.inference.debug.views import Picture, Table

GREEDY, DRAWN = Sampling(greedy=True), Sampling(temperature=0.5, top_k=3, top_p=0.9)


@pytest.fixture(scope='module')
def tokenizer():
    tokenizer = train_char(['abcdef'])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (VOCAB, 7)
    return tokenizer


@pytest.fixture
def debugger(tokenizer):
    return Debugger(ToyInspector(), tokenizer, tokenizer.encode('ab'), max_new_tokens=5)


class Play:
    """A session that remembers its state and its last reply."""

    def __init__(self, debugger, sampling=GREEDY, seed=0):
        self.debugger = debugger
        self.state, self.reply = debugger.start(sampling, seed)

    def __call__(self, *lines):
        for line in lines:
            self.state, self.reply = self.debugger.respond(self.state, line)
        return self.reply

    @property
    def tokens(self):
        return [each.token for each in self.state.taken]

    def error(self, line):
        before = self.state
        (message,) = self(line)
        assert self.state == before
        assert message.startswith('error: ')
        assert '\n' not in message
        return message.removeprefix('error: ')


@pytest.fixture
def play(debugger):
    return Play(debugger)


def column(table, name):
    return [row[table.header.index(name)] for row in table.rows]


# Candidates.


def test_candidates_are_shown_before_and_after_each_filter(debugger):
    _, (hint, table) = debugger.start(DRAWN, seed=0)
    assert hint == 'help lists the commands'
    assert table.title == "token 0 of the text, after 2 tokens: 'ab'"
    assert table.header == ('', 'rank', 'token', 'id', 'model', 'temperature=0.5', 'top_k=3', 'top_p=0.9')
    assert column(table, 'token')[:4] == ["'c'", "'d'", "'e'", "'f'"]
    assert column(table, 'rank')[:4] == ['1', '2', '3', '4']
    assert column(table, 'model')[:4] == ['0.5000', '0.2500', '0.1250', '0.1250']
    # Squared: 16 4 1 1 of 22. Both that tie for the third place stay; then 20/22 of them reach 0.9.
    assert column(table, 'temperature=0.5')[:4] == [f'{share / 22:.4f}' for share in (16, 4, 1, 1)]
    assert column(table, 'top_k=3')[:5] == [*(f'{share / 22:.4f}' for share in (16, 4, 1, 1)), '-']
    assert column(table, 'top_p=0.9')[:4] == ['0.8000', '0.2000', '-', '-']
    assert [row[2] for row in table.rows[-2:]] == ['entropy in nats', 'tokens left']
    assert column(table, 'model')[-2:] == [f'{1.75 * math.log(2):.3f}', '8']
    assert column(table, 'top_p=0.9')[-2:] == [f'{-0.8 * math.log(0.8) - 0.2 * math.log(0.2):.3f}', '2']


def test_the_chosen_token_is_marked_and_shown_even_where_it_is_not_among_the_likeliest(debugger):
    for seed in range(30):
        state, (_, table) = debugger.start(Sampling(), seed)
        token = debugger.respond(state, 'step')[0].taken[0]
        assert table.rows[table.marked][3] == str(token.token)
        assert column(table, '').count('>') == 1
        _, (short,) = debugger.respond(state, 'top 1')
        assert short.rows[short.marked][3] == str(token.token)
        assert len(short.rows) == (3 if token.rank == 1 else 4)


def test_a_greedy_choice_has_no_filters_and_takes_the_likeliest(play):
    (table,) = play('show')
    assert table.header[4:] == ('model',)
    play('step', '', 's')
    assert play.tokens == [2, 3, 4]


# Going on, back, and elsewhere.


def test_draws_follow_the_distribution_that_is_shown(debugger):
    taken = [debugger.respond(debugger.start(DRAWN, seed)[0], 'step')[0].taken[0].token for seed in range(400)]
    assert set(taken) == {2, 3}
    assert taken.count(2) / 400 == pytest.approx(0.8, abs=0.07)


def test_a_step_is_told_of_with_its_numbers(play):
    play('pick 3')
    (taken,) = play.state.taken
    assert (taken.token, taken.rank, taken.forced) == (4, 3, True)
    assert (taken.probability, taken.drawn_from) == (pytest.approx(1 / 8), pytest.approx(1 / 8))
    assert taken.entropy == pytest.approx(1.75 * math.log(2))
    play('step')
    (table,) = play('history')
    assert table.rows == (
        ('0', "'e'", '3', '0.1250', '0.1250', '1.213', 'forced'),
        ('1', "'f'", '1', '0.5000', '0.5000', '1.213', ''),
    )


def test_back_undoes_and_the_same_steps_come_again(debugger):
    play = Play(debugger, Sampling(), seed=3)
    play('step', 'step', 'step', 'step')
    tokens, reply = play.tokens, play.reply
    play('back', 'back 2')
    assert play.tokens == tokens[:1]
    play('run 3')
    assert play.tokens == tokens
    assert play('show') == reply
    play('back 4')
    assert play.state == debugger.start(Sampling(), seed=3)[0]
    assert 'N=1: only 0 tokens have been taken' in play.error('back')


def test_run_goes_to_the_number_of_new_tokens_and_tells_each(play):
    history, candidates = play('run')
    assert play.tokens == [2, 3, 4, 5, 6]
    assert column(history, 'token') == ["'c'", "'d'", "'e'", "'f'", "'<|unknown|>'"]
    assert candidates.title.startswith('token 5 of the text')
    history, _ = play('back 5', 'run 2')
    assert column(history, 'token') == ["'c'", "'d'"]


def test_the_text_ends_at_end_of_text_and_back_leads_out(play):
    history, message = play('run 9')
    assert play.tokens == [2, 3, 4, 5, 6, 7]
    assert len(history.rows) == 6
    assert message == 'the text has ended: back undoes, quit leaves'
    for line in ('step', 'run', 'pick 1', 'force a'):
        assert play.error(line) == 'the text has ended; go back, or quit'
    play('back')
    assert isinstance(play.reply[0], Table)


def test_the_text_ends_where_the_context_is_full(tokenizer):
    play = Play(Debugger(ToyInspector(block_size=5), tokenizer, tokenizer.encode('ab'), max_new_tokens=9))
    assert play('run')[-1] == 'prompt and text fill block_size=5: back undoes, quit leaves'
    assert play.tokens == [2, 3, 4]
    assert play.error('step') == 'prompt and text fill block_size=5; go back, or quit'
    play('back 2')
    assert 'fill block_size=5' in play.error('force abc')


@pytest.mark.parametrize(
    ('argument', 'tokens'),
    [('fa', [5, 0]), ('"b"', [1]), (r'"\u0063"', [2]), ('#6', [6]), (' ', [6]), ('#7', [7])],
)
def test_a_forced_token_is_taken_as_it_stands(play, argument, tokens):
    play(f'force {argument}\n')
    assert play.tokens == tokens
    assert all(each.forced for each in play.state.taken)


def test_what_a_filter_dropped_can_be_forced_and_has_no_probability(debugger):
    play = Play(debugger, DRAWN)
    play('force f')
    assert play.state.taken[0].drawn_from == 0
    assert play('history')[0].rows[0][3:5] == ('0.1250', '-')


def test_settings_and_seed_change_from_here_on(debugger):
    play = Play(debugger, Sampling(), seed=0)
    play('step')
    (table,) = play('set temperature=2', 'set top_k=2')
    assert table.header[4:] == ('model', 'temperature=2', 'top_k=2')
    shares = np.sqrt([4, 2])
    assert column(table, 'top_k=2')[:2] == [f'{share:.4f}' for share in shares / shares.sum()]
    (table,) = play('set greedy=true')
    assert table.header[4:] == ('model',)
    assert play.state.taken[0].drawn_from == pytest.approx(play.state.taken[0].probability)
    drawn = {Play(debugger, Sampling(), seed=0)(f'seed {seed}')[0].marked for seed in range(20)}
    assert len(drawn) > 1


# Looking.


def test_the_lens_tells_what_each_layer_makes_of_the_chosen_token(play):
    (table,) = play('lens')
    assert table.header[1] == "rank of 'c'"
    assert column(table, 'after') == ['embedding', 'layer 0', 'layer 1']
    halves = np.sqrt(shares_after(1))
    assert column(table, 'probability') == ['0.1250', f'{halves[2] / halves.sum():.4f}', '0.5000']
    assert column(table, "rank of 'c'") == ['3', '1', '1']
    assert column(table, 'entropy')[0] == f'{math.log(8):.3f}'
    assert column(table, 'likeliest there')[2] == "'c' 0.5000  'd' 0.2500  'e' 0.1250"


def test_attention_is_shown_as_weights_and_as_a_map(play):
    attended, shades = play('attention 0 1')
    assert attended.title == 'layer 0, head 1: what the last token looks at'
    assert attended.rows == (('0', "'a'", '0.5000', '#' * 12), ('1', "'b'", '0.5000', '#' * 12))
    assert shades.rows == (('0', "'a'", '|@|'), ('1', "'b'", '|@@|'))
    assert play('attention 0 0')[1].rows == (('0', "'a'", '|@|'), ('1', "'b'", '| @|'))
    assert play('attention 1 0')[1].rows == (('0', "'a'", '|@|'), ('1', "'b'", '|@ |'))
    assert play('attention 0 mean')[0].rows[0] == ('1', "'b'", '0.7500', '#' * 18)


def test_a_map_of_a_long_text_shows_the_last_tokens(tokenizer):
    play = Play(Debugger(ToyInspector(99), tokenizer, [0] * 50, 5))
    _, shades = play('attention 0 1')
    assert [row[0] for row in shades.rows] == [str(place) for place in range(18, 50)]
    assert shades.rows[-1][2] == f'|{"@" * 32}|'


def test_a_picture_is_asked_for_and_not_written(play, tmp_path):
    *_, picture = play(f'attention 1 1 {tmp_path}/a map.png')
    assert isinstance(picture, Picture)
    assert (picture.path, picture.labels, picture.title) == (f'{tmp_path}/a map.png', ("'a'", "'b'"), 'layer 1, head 1')
    np.testing.assert_allclose(picture.weights_TS, [[1, 0], [0.5, 0.5]])
    assert not list(tmp_path.iterdir())


def test_the_text_so_far_is_told(play):
    assert play('run 2', 'text') == ['abcd']


def test_control_characters_do_not_reach_the_terminal():
    tokenizer = train_char(['abc\x1b\n\t'])
    play = Play(Debugger(ToyInspector(), tokenizer, tokenizer.encode('a\x1b\t\nb'), 1))
    assert play('text') == ['a\\x1b\t\nb']


def test_help_lists_what_can_be_typed(play):
    (table,) = play('help')
    assert [row[0].split()[0] for row in table.rows] == [
        *('step', 'run', 'back', 'pick', 'force', 'show', 'top', 'lens', 'attention', 'history', 'text', 'set'),
        *('seed', 'help', 'quit'),
    ]


@pytest.mark.parametrize('line', ['q', 'quit', 'QUIT'])
def test_quit_ends_the_session(play, line):
    play(line)
    assert play.state.done == (line != 'QUIT')


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('jump', "'jump' is no command; help lists them"),
        ('run 0', "N='0' must be a whole number, 1 or more"),
        ('run all', "N='all' must be a whole number"),
        ('back -1', "N='-1' must be a whole number"),
        ('pick', "RANK='' must be a whole number, 1 to 8"),
        ('pick 9', "RANK='9' must be a whole number, 1 to 8"),
        ('force', 'force needs a text, as in: force " the"'),
        ('force ""', 'force needs a text'),
        ('force "a', '"a: not a JSON string; close the quotes'),
        ('force #8', "#ID='8' must be a whole number, 0 to 7"),
        ('force #x', "#ID='x' must be a whole number"),
        ('force "\\ud800"', 'lone surrogate'),
        ('top 0', "N='0' must be a whole number, 1 or more"),
        ('attention', 'attention needs a layer and a head, as in: attention 0 1'),
        ('attention 2 0', "LAYER='2' must be a whole number, 0 to 1"),
        ('attention 0 2', "HEAD='2' must be a whole number, 0 to 1"),
        ('set', "'' is no setting; set takes NAME=VALUE, with one of greedy, temperature, top_k"),
        ('set heat=1', "'heat' is no setting"),
        ('set temperature', 'temperature=: must be a number'),
        ('set temperature=warm', 'temperature=warm: must be a number'),
        ('set top_k=1.5', 'top_k=1.5: must be a whole number'),
        ('set greedy=1', 'greedy=1: must be true or false'),
        ('set top_p=2', 'top_p=2.0 must be above 0 and at most 1'),
        ('seed 4294967296', "N='4294967296' must be a whole number, 0 to 4294967295"),
        ('top ' + '9' * 5000, 'must be a whole number, 1 or more'),
        ('seed one', "N='one' must be a whole number"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(play, line, message):
    play('step')
    assert message in play.error(line)


@pytest.mark.parametrize(
    ('prompt', 'max_new_tokens', 'message'),
    [
        ([0] * 12, 5, 'the prompt has 12 tokens and the model sees block_size=12 in all.* at most 11'),
        ([0], 0, 'max_new_tokens=0 must be at least 1'),
    ],
)
def test_what_leaves_no_room_is_refused(tokenizer, prompt, max_new_tokens, message):
    with pytest.raises(InputError, match=message):
        Debugger(ToyInspector(), tokenizer, prompt, max_new_tokens)


def test_an_empty_prompt_starts_a_new_document(tokenizer):
    play = Play(Debugger(ToyInspector(), tokenizer, [], 5))
    play('step')
    assert play.tokens == [0]
