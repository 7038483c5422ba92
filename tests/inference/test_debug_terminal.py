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
    [('map.jpg', 'the picture is a PNG; end it in .png'), ('no/map.png', 'cannot be written')],
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
