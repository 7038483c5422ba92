"""The debugger: commands in, replies out, and the state between them. Nothing here reads or prints."""

import dataclasses
import functools
import json
from collections.abc import Sequence

import numpy as np

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference.debug import views
from gpt_jax.inference.debug.choice import ModelInspector, TokenChoice, choose, likeliest
from gpt_jax.inference.sampling import LARGEST_SEED, Sampling
from gpt_jax.inference.text import harmless

# Name, arguments, what it does. Of several that begin alike, their first letters mean the first one.
COMMANDS = (
    ('step', '', 'take the token marked >; so does an empty line'),
    ('run', '[N]', 'N steps, or all that max_new_tokens leaves'),
    ('back', '[N]', 'undo the last N tokens, or one'),
    ('pick', 'RANK', 'take the token of this rank instead'),
    ('force', 'TEXT', 'take the tokens of a text; "..." has escapes as in JSON, #ID is one token'),
    ('show', '', 'the candidates again'),
    ('top', 'N', 'how many candidates are shown'),
    ('lens', '', 'what each layer would say comes next'),
    ('attention', 'LAYER HEAD [FILE.png]', 'who looks at whom; both from 0, HEAD may be mean'),
    ('history', '', 'the tokens taken so far, with rank and probability'),
    ('text', '', 'prompt and text so far'),
    ('set', 'NAME=VALUE', 'change a setting of sampling from here on, e.g. temperature=0.7'),
    ('seed', 'N', 'draw with another seed from here on'),
    ('help', '', 'this list'),
    ('quit', '', 'leave; so does the end of the input'),
)

DIGITS = 20  # of a number, at most

Reply = list[str | views.Table | views.Picture]


def full_name(name: str) -> str:
    """The command that begins so; an empty line is a step. Raises InputError where none does."""
    for command, _, _ in COMMANDS:
        if command.startswith(name):
            return command
    raise InputError(f'{name!r} is no command; help lists them')


def parse_number(argument: str, name: str, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`. Raises InputError on anything else."""
    argument = argument.strip()
    if (
        len(argument) < DIGITS
        and argument.isascii()
        and argument.isdigit()
        and least <= int(argument)
        and (most is None or int(argument) <= most)
    ):
        return int(argument)
    end = 'or more' if most is None else f'to {most}'
    raise InputError(f'{name}={argument!r} must be a whole number, {least} {end}')


def parse_tokens(argument: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text as `force` takes it: as it stands, as a JSON string, or #ID.

    Raises:
      InputError: it is empty, not JSON though it begins with quotes, or an id that the vocabulary has not.
    """
    if argument.startswith('#'):
        token = parse_number(argument[1:], '#ID', 0, tokenizer.vocab_size - 1)
        if not tokenizer.is_token(token + 1)[token]:
            raise InputError(f'#{token}: no token has this id')
        return [token]
    text = argument
    if argument.startswith('"'):
        try:
            text = json.loads(argument)
        except ValueError:
            raise InputError(f'{argument}: not a JSON string; close the quotes, or write none') from None
    if not text:
        raise InputError('force needs a text, as in: force " the"')
    return tokenizer.encode(text)


def settings(sampling: Sampling) -> dict[str, type]:
    """The settings that `set` changes, with the types of their values."""
    kinds = {field.name: type(getattr(sampling, field.name)) for field in dataclasses.fields(sampling)}
    return {name: kind for name, kind in kinds.items() if kind in (bool, int, float)}


def change_setting(sampling: Sampling, argument: str) -> Sampling:
    """The settings with NAME=VALUE in them. Raises InputError where there is no such setting, or no such value."""
    name, _, text = (part.strip() for part in argument.partition('='))
    numbers = settings(sampling)
    if name not in numbers:
        raise InputError(f'{name!r} is no setting; set takes NAME=VALUE, with one of {", ".join(numbers)}')
    try:
        value = json.loads(text) if numbers[name] is bool else numbers[name](text)
    except ValueError:
        value = None
    if not isinstance(value, numbers[name]):
        kind = {bool: 'true or false', int: 'a whole number', float: 'a number'}[numbers[name]]
        raise InputError(f'{name}={text}: must be {kind}')
    return dataclasses.replace(sampling, **{name: value})


@dataclasses.dataclass(frozen=True)
class TakenToken:
    """A token of the text.

    Attributes:
      token: its id.
      rank: its place in the model's order, from 1.
      probability: the model's own.
      drawn_from: its probability after all filters; 0 where one dropped it.
      entropy: of the model's distribution, in nats.
      forced: whether a command named it.
    """

    token: int
    rank: int
    probability: float
    drawn_from: float
    entropy: float
    forced: bool


@dataclasses.dataclass(frozen=True)
class SessionState:
    """All that commands change.

    Attributes:
      taken: the new tokens, the oldest first.
      sampling: how the next one is chosen.
      seed: of the draws.
      top: how many candidates are shown.
      done: whether the session is over.
    """

    taken: tuple[TakenToken, ...]
    sampling: Sampling
    seed: int
    top: int = 10
    done: bool = False


class Debugger:
    """Generates from one prompt under commands.

    `respond` is a function of a state and a command: the same ones give the same answer, whatever came before.

    Args:
      inspector: the model.
      tokenizer: of its vocabulary.
      prompt: token ids; empty starts a new document, from end-of-text.
      max_new_tokens: where `run` stops.
      ends: the tokens that end a text; none: the tokenizer's end of text.

    Raises:
      InputError: the prompt leaves no room in block_size, or max_new_tokens is below 1.
    """

    def __init__(
        self,
        inspector: ModelInspector,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        max_new_tokens: int,
        ends: Sequence[int] = (),
    ):
        self._inspector, self._tokenizer = inspector, tokenizer
        self._ends = tuple(ends) or (tokenizer.end_of_text,)
        self._prompt = tuple(prompt) or (tokenizer.end_of_text,)
        self._room = inspector.block_size - len(self._prompt)
        if max_new_tokens < 1:
            raise InputError(f'max_new_tokens={max_new_tokens} must be at least 1')
        if self._room < 1:
            raise InputError(
                f'the prompt has {len(self._prompt)} tokens and the model sees block_size={inspector.block_size} in '
                f'all; shorten the prompt to at most {inspector.block_size - 1}'
            )
        self._max_new_tokens = min(max_new_tokens, self._room)
        self._choice = functools.lru_cache(maxsize=16)(self._make_choice)

    def start(self, sampling: Sampling, seed: int = 0) -> tuple[SessionState, Reply]:
        """The state before the first token."""
        state = SessionState((), sampling, seed)
        return state, ['help lists the commands', *self._view(state)]

    def respond(self, state: SessionState, line: str) -> tuple[SessionState, Reply]:
        """The state after a command, and what there is to show; a command that cannot be changes nothing."""
        name, _, argument = line.strip('\r\n').lstrip().partition(' ')
        try:
            return getattr(self, f'_{full_name(name)}')(state, argument)
        except InputError as error:
            return state, [f'error: {error}']

    # What the state means.

    def _tokens(self, state: SessionState) -> tuple[int, ...]:
        return (*self._prompt, *(each.token for each in state.taken))

    def _make_choice(self, sampling: Sampling, seed: int, new: int, tokens: tuple[int, ...]) -> TokenChoice:
        logits_V = self._inspector.lens(tokens)[-1]
        return choose(sampling, logits_V, tokens, new, self._ends, seed)

    def _choice_of(self, state: SessionState) -> TokenChoice:
        return self._choice(state.sampling, state.seed, len(state.taken), self._tokens(state))

    def _over(self, state: SessionState) -> str | None:
        """Why no token can be taken, if none can."""
        if state.taken and state.taken[-1].token in self._ends:
            return 'the text has ended'
        if len(state.taken) >= self._room:
            return f'prompt and text fill block_size={self._inspector.block_size}'
        return None

    def _take(self, state: SessionState, token: int | None = None) -> SessionState:
        """With one more token: the one that is drawn, or the one that is forced."""
        reason = self._over(state)
        if reason:
            raise InputError(f'{reason}; go back, or quit')
        choice = self._choice_of(state)
        chosen = choice.chosen if token is None else token
        probability, drawn_from = map(float, choice.probabilities[(0, -1), chosen])
        numbers = (choice.rank(chosen), probability, drawn_from, float(choice.entropies[0]))
        return dataclasses.replace(state, taken=(*state.taken, TakenToken(chosen, *numbers, forced=token is not None)))

    def _view(self, state: SessionState) -> Reply:
        reason = self._over(state)
        if reason:
            return [f'{reason}: back undoes, quit leaves']
        choice, count = self._choice_of(state), len(self._tokens(state))
        title = f'token {len(state.taken)} of the text, after {count} tokens: {self._tail(state)}'
        return [views.candidates(choice, self._tokenizer, state.top, title)]

    def _tail(self, state: SessionState) -> str:
        text = self._tokenizer.decode(self._tokens(state))
        return repr(text if len(text) <= 40 else f'...{text[-37:]}')

    def _history_of(self, state: SessionState, first: int) -> views.Table:
        rows = []
        for index, taken in enumerate(state.taken[first:], first):
            shares = map(views.show_probability, (taken.probability, taken.drawn_from))
            name, how = views.show_token(self._tokenizer, taken.token), 'forced' if taken.forced else ''
            rows.append((str(index), name, str(taken.rank), *shares, f'{taken.entropy:.3f}', how))
        header = ('', 'token', 'rank', 'model', 'after all filters', 'entropy', '')
        return views.Table('tokens taken', header, tuple(rows))

    # The commands, each a function of the state and its argument.

    def _step(self, state: SessionState, _: str) -> tuple[SessionState, Reply]:
        state = self._take(state)
        return state, self._view(state)

    def _run(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        count = parse_number(argument or str(max(self._max_new_tokens - len(state.taken), 1)), 'N', 1)
        first = len(state.taken)
        state = self._take(state)
        while len(state.taken) < first + count and not self._over(state):
            state = self._take(state)
        return state, [self._history_of(state, first), *self._view(state)]

    def _back(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        count = parse_number(argument or '1', 'N', 1)
        if count > len(state.taken):
            raise InputError(f'N={count}: only {len(state.taken)} tokens have been taken')
        state = dataclasses.replace(state, taken=state.taken[:-count])
        return state, self._view(state)

    def _pick(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        logprobs_V = self._choice_of(state).logprobs_SV[0]
        wanted = parse_number(argument, 'RANK', 1, int(np.isfinite(logprobs_V).sum()))
        state = self._take(state, int(likeliest(logprobs_V, wanted)[-1]))
        return state, self._view(state)

    def _force(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        for token in parse_tokens(argument, self._tokenizer):
            state = self._take(state, token)
        return state, self._view(state)

    def _show(self, state: SessionState, _: str) -> tuple[SessionState, Reply]:
        return state, self._view(state)

    def _top(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        state = dataclasses.replace(state, top=parse_number(argument, 'N', 1))
        return state, self._view(state)

    def _lens(self, state: SessionState, _: str) -> tuple[SessionState, Reply]:
        logits_LV = self._inspector.lens(self._tokens(state))
        return state, [views.lens(logits_LV, self._tokenizer, self._choice_of(state).chosen)]

    def _attention(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        words = argument.split(maxsplit=2)
        if len(words) < 2:
            raise InputError('attention needs a layer and a head, as in: attention 0 1')
        layer = parse_number(words[0], 'LAYER', 0, self._inspector.n_layer - 1)
        head = words[1] if words[1] == 'mean' else parse_number(words[1], 'HEAD', 0, self._inspector.n_head - 1)
        tokens = self._tokens(state)
        maps_NTS = self._inspector.attention(tokens, layer)
        weights_TS = maps_NTS.mean(axis=0) if head == 'mean' else maps_NTS[head]
        title = f'layer {layer}, ' + ('mean of all heads' if head == 'mean' else f'head {head}')
        reply = [
            views.most_attended(weights_TS[-1], tokens, self._tokenizer, f'{title}: what the last token looks at'),
            views.attention_table(weights_TS, tokens, self._tokenizer),
        ]
        if len(words) == 3:
            labels = tuple(views.show_token(self._tokenizer, token) for token in tokens)
            reply.append(views.Picture(words[2], weights_TS, labels, title))
        return state, reply

    def _history(self, state: SessionState, _: str) -> tuple[SessionState, Reply]:
        return state, [self._history_of(state, 0)]

    def _text(self, state: SessionState, _: str) -> tuple[SessionState, Reply]:
        return state, [harmless(self._tokenizer.decode(self._tokens(state)))]

    def _set(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        state = dataclasses.replace(state, sampling=change_setting(state.sampling, argument))
        return state, self._view(state)

    def _seed(self, state: SessionState, argument: str) -> tuple[SessionState, Reply]:
        state = dataclasses.replace(state, seed=parse_number(argument, 'N', 0, LARGEST_SEED))
        return state, self._view(state)

    def _help(self, state: SessionState, _: str) -> tuple[SessionState, Reply]:
        rows = tuple((f'{name} {arguments}'.strip(), meaning) for name, arguments, meaning in COMMANDS)
        return state, [views.Table('commands; their first letters are enough', ('command', 'what it does'), rows)]

    def _quit(self, state: SessionState, _: str) -> tuple[SessionState, Reply]:
        return dataclasses.replace(state, done=True), []
