"""What there is to see: tables of text, and attention as a picture."""

import dataclasses
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.files import replacing
from gpt_jax.inference.debug.choice import TokenChoice, entropy, likeliest, log_softmax, rank

# From nothing to the largest of a row.
SHADES = ' .:-=+*#%@'
MAP_TOKENS = 32  # of an attention map, the last ones
ATTENDED = 8  # tokens that the last one looks at most
LENS_TOKENS = 3
BAR = 24  # characters of a weight of 1
NAMED_TOKENS = 64  # of a picture; with more, the axes are numbered


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under a header.

    Attributes:
      title, header, rows: what is shown.
      marked: the row that matters most, if any does.
      names: how many columns, from the first on, say what a row is about; a narrow terminal shows them again before
        each part of the others.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None
    names: int = 1


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """A token in quotes, with control characters escaped; as bytes where it is no whole character."""
    data = tokenizer.token_bytes(token)
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def show_probability(value: float) -> str:
    """Four digits, fewer where it is small; a dash where the token was dropped."""
    if value == 0:
        return '-'
    return f'{value:.4f}' if value >= 1e-4 else f'{value:.0e}'


def candidates(choice: TokenChoice, tokenizer: Tokenizer, count: int, title: str) -> Table:
    """The likeliest tokens before and after each filter, with the chosen one among them."""
    tokens = [int(token) for token in likeliest(choice.logprobs_SV[0], min(count, int(choice.kept[0])))]
    if choice.chosen not in tokens:
        tokens.append(choice.chosen)
    rows = []
    for token in tokens:
        mark = '>' if token == choice.chosen else ''
        shares = (show_probability(value) for value in choice.probabilities[:, token])
        rows.append((mark, str(choice.rank(token)), show_token(tokenizer, token), str(token), *shares))
    rows.append(('', '', 'entropy in nats', '', *(f'{value:.3f}' for value in choice.entropies)))
    rows.append(('', '', 'tokens left', '', *(str(value) for value in choice.kept)))
    header = ('', 'rank', 'token', 'id', *choice.names)
    return Table(title, header, tuple(rows), tokens.index(choice.chosen), names=3)


def lens(logits_LV: np.ndarray, tokenizer: Tokenizer, token: int) -> Table:
    """What each layer would say comes next, and what it thinks of `token`."""
    logprobs_LV = log_softmax(logits_LV)
    rows = []
    for layer, logprobs_V in enumerate(logprobs_LV):
        guesses = [
            f'{show_token(tokenizer, int(each))} {show_probability(np.exp(logprobs_V[each]))}'
            for each in likeliest(logprobs_V, LENS_TOKENS)
        ]
        place = 'embedding' if layer == 0 else f'layer {layer - 1}'
        own = (str(rank(logprobs_V, token)), show_probability(np.exp(logprobs_V[token])))
        rows.append((place, *own, f'{entropy(logprobs_V):.3f}', '  '.join(guesses)))
    name = show_token(tokenizer, token)
    header = ('after', f'rank of {name}', 'probability', 'entropy', 'likeliest there')
    return Table('logit lens: the final LayerNorm and the output head after every layer', header, tuple(rows))


def most_attended(weights_S: np.ndarray, tokens: Sequence[int], tokenizer: Tokenizer, title: str) -> Table:
    """The tokens that the last one looks at most."""
    rows = [
        (str(place), show_token(tokenizer, tokens[place]), f'{weights_S[place]:.4f}', _bar(weights_S[place]))
        for place in likeliest(weights_S, ATTENDED)
    ]
    return Table(title, ('place', 'token', 'weight', ''), tuple(rows))


def attention_table(weights_TS: np.ndarray, tokens: Sequence[int], tokenizer: Tokenizer) -> Table:
    """Who looks at whom among the last tokens, as shades; a row's darkest is its largest weight."""
    first = max(0, len(tokens) - MAP_TOKENS)
    rows = []
    for place in range(first, len(tokens)):
        weights_S = weights_TS[place, first : place + 1]
        shares = weights_S / max(weights_S.max(), 1e-30)
        shades = ''.join(SHADES[round(float(share) * (len(SHADES) - 1))] for share in shares)
        rows.append((str(place), show_token(tokenizer, tokens[place]), f'|{shades}|'))
    title = f'each token (a row) looks at those from place {first} on (columns), shaded {SHADES!r}'
    return Table(title, ('at', 'token', ''), tuple(rows))


def _bar(weight: float) -> str:
    return '#' * round(BAR * float(weight))


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An attention map [time, keys] to be written to `path`, with a label for each token."""

    path: str
    weights_TS: np.ndarray
    labels: tuple[str, ...]
    title: str


def save_picture(picture: Picture) -> None:
    """Writes a PNG, whole or not at all: who looks a row, who is looked at a column.

    Raises:
      InputError: `path` does not end in .png, or cannot be written.
    """
    try:
        path, labels = pathlib.Path(picture.path).expanduser(), picture.labels
    except RuntimeError as error:
        raise InputError(f'{picture.path} cannot be written ({error}); name another file') from None
    if path.suffix.lower() != '.png':
        raise InputError(f'{path}: the picture is a PNG; end it in .png')
    size = 3 + 0.16 * min(len(labels), NAMED_TOKENS)
    figure = Figure(figsize=(size + 1, size), layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(picture.weights_TS, vmin=0, cmap='viridis', interpolation='nearest')
    if len(labels) <= NAMED_TOKENS:
        # Escaped, as fonts lack most scripts; no token is a formula.
        plain = [label.encode('ascii', 'backslashreplace').decode() for label in labels]
        settings = {'labels': plain, 'fontsize': 7, 'parse_math': False}
        axes.set_xticks(range(len(labels)), rotation=90, **settings)
        axes.set_yticks(range(len(labels)), **settings)
    axes.set_xlabel('is looked at')
    axes.set_ylabel('looks')
    axes.set_title(picture.title, fontsize=9)
    figure.colorbar(image, label='probability')
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=120)
    with replacing(path) as file:
        file.write(content.getvalue())
