"""What the debugger prints, to a pipe and to a terminal, and the pictures that it writes."""

import io
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from toy_inspector import ToyInspector

from gpt_jax.data.tokenizer import train_char
from gpt_jax.errors import InputError
from gpt_jax.inference import Sampling
from gpt_jax.inference.debug import Debugger, views
from gpt_jax.inference.debug.terminal import DebugPrompt, show
from gpt_jax.inference.debug.views import Table, show_probability, show_token

TABLE = Table('a title, longer than its table', ('', 'token', 'p'), (('', "'[red]'", '0.2'), ('>', "':x:'", '0.8')), 1)


def printed(reply, **settings):
    console = Console(file=io.StringIO(), highlight=False, markup=False, emoji=False, **settings)
    show(reply, console)
    return console.file.getvalue()


def test_a_pipe_gets_plain_lines_without_trailing_space():
    assert printed(['a line', TABLE], width=100) == (
        "a line\na title, longer than its table\n   token    p\n   '[red]'  0.2\n>  ':x:'    0.8\n"
    )


def test_a_terminal_gets_the_marked_row_in_colour():
    lines = printed([TABLE], force_terminal=True, width=100, color_system='standard').splitlines()
    assert ['\x1b[1;32m' in line for line in lines] == [False, False, False, True]
    assert "'[red]'" in lines[2]


def test_a_long_line_is_not_broken():
    assert printed(['word ' * 60], width=40).count('\n') == 1


def heat(path, **changes):
    weights_TS = np.tril(np.ones((3, 3))) / np.arange(1, 4)[:, None]
    settings = {'weights_TS': weights_TS, 'labels': ("'$x^$'", "'日'", "b'\\xc3'"), 'title': 'layer 0'} | changes
    return views.Picture(str(path), **settings)


def test_a_picture_is_written_whole_and_said_to_be(tmp_path, recwarn):
    path = tmp_path / 'map.png'
    assert printed([heat(path)], width=100) == f'written: {path}\n'
    pixels = imread(path)
    assert pixels.ndim == 3
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 10
    assert [each.name for each in tmp_path.iterdir()] == ['map.png']
    assert not recwarn.list


def test_a_picture_of_a_long_text_stays_small(tmp_path):
    views.save_picture(heat(tmp_path / 'map.png', weights_TS=np.eye(300), labels=('a',) * 300))
    assert max(imread(tmp_path / 'map.png').shape[:2]) < 2500


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('map.jpg', 'the picture is a PNG; end it in .png'),
        ('no/map.png', 'cannot be written'),
    ],
)
def test_a_picture_that_cannot_be_is_one_line(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        views.save_picture(heat(tmp_path / name))
    assert printed([heat(tmp_path / name)], width=100).startswith(f'error: {tmp_path / name}')
    assert not list(tmp_path.iterdir())


@pytest.fixture
def session(monkeypatch):
    """A function: lines of a pipe -> the prompt that read them, and what it printed."""

    def run(lines):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(lines)))
        tokenizer = train_char(['abcdef'])
        console = Console(file=io.StringIO(), width=100, highlight=False, markup=False, emoji=False)
        debugger = Debugger(ToyInspector(), tokenizer, tokenizer.encode('ab'), max_new_tokens=5)
        prompt = DebugPrompt(debugger, Sampling(greedy=True), 0, console)
        prompt.cmdloop()
        return prompt, console.file.getvalue()

    return run


def test_a_pipe_is_read_to_its_end_or_to_quit(session):
    _, output = session(b'step\n\nforce  \xff\ntext\n')
    told = [line for line in output.splitlines() if line.startswith('(debug)')]
    assert told == ['(debug) step', '(debug) ', '(debug) force  \ufffd', '(debug) text']
    assert output.splitlines()[-1].startswith('abcd')
    _, output = session(b'quit\nstep\n')
    assert output.splitlines()[-1] == '(debug) quit'


def test_tab_completes_commands_and_settings(session):
    prompt, _ = session(b'')
    assert prompt.completenames('s') == ['step', 'show', 'set', 'seed']
    assert prompt.complete_set('top') == ['top_k=', 'top_p=']


@pytest.mark.parametrize(
    ('data', 'shown'),
    [(b' the', "' the'"), (b'\n', r"'\n'"), (b'\x1b[31m', r"'\x1b[31m'"), (b'\xc3', r"b'\xc3'"), ('é'.encode(), "'é'")],
)
def test_a_token_is_shown_so_that_nothing_of_it_is_lost_or_obeyed(data, shown):
    class Vocabulary:
        def token_bytes(self, token):
            return data

    assert show_token(Vocabulary(), 0) == shown


def test_probabilities_keep_their_size():
    assert [show_probability(p) for p in (1.0, 0.12345, 0.0001, 0.000012, 0.0)] == [
        *('1.0000', '0.1235', '0.0001', '1e-05', '-'),
    ]


WIDE = Table(
    'title',
    ('', 'rank', 'token', 'id', 'model', 'repetition_penalty=1.25', 'temperature=0.7', 'top_p=0.9', 'typical_p=0.95'),
    (
        ('', '1', "' the'", '262', '0.1234', '0.2345', '0.3456', '0.4567', '-'),
        ('>', '2', repr('-' * 64), '50256', '1e-30', '1e-36', '8e-52', '-', '0.5678'),
        ('', '', 'entropy in nats', '', '1.213', '1.190', '1.012', '0.837', '0.123'),
    ),
    1,
    names=3,
)


@pytest.mark.parametrize('width', [40, 47, 60, 80, 100])
def test_on_a_narrow_terminal_a_table_is_shown_in_parts_that_lose_nothing(width):
    lines = printed([WIDE], width=width).splitlines()
    assert all(len(line) <= width for line in lines)
    parts = [part.split() for part in '\n'.join(lines[1:]).split('   rank')[1:]]
    shown = ''.join(''.join(part) for part in parts)
    for cell in {cell for row in WIDE.rows for cell in row[3:]}:
        assert cell in shown
    for number in ('0.1234', '0.2345', '0.3456', '0.4567', '0.5678'):
        assert sum(number in line for line in lines) == 1
    # Each part says again which token a row is of.
    assert len(parts) > 1
    assert all("'the'" in ''.join(part) for part in parts)
    assert not any('columns; tables need' in line for line in lines)


def test_a_terminal_too_narrow_for_any_table_is_told_so():
    assert '(this terminal has 30 columns; tables need 40)' in printed([WIDE], width=30)


def test_an_attention_map_fits_a_narrow_terminal():
    tokenizer = train_char(['abcdef'])
    tokens = tokenizer.encode('abcdef' * 170)
    weights_TS = np.tril(np.ones((len(tokens), len(tokens))))
    lines = printed([views.attention_table(weights_TS, tokens, tokenizer)], width=40).splitlines()
    assert lines[-1] == f'1019  |{"@" * 32}|'


def test_commands_of_a_pipe_without_an_end_are_refused(session):
    with pytest.raises(InputError, match='a command has more than 65,536 characters'):
        session(b'\0' * 10**6)
