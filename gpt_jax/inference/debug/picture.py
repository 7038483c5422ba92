"""Attention as a picture."""

import dataclasses
import io
import pathlib

import numpy as np
from matplotlib.figure import Figure

from gpt_jax.errors import InputError
from gpt_jax.files import replacing

NAMED_TOKENS = 64  # with more, the axes are numbered


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An attention map [time, keys] to be written to `path`, with a label for each token."""

    path: str
    weights_TS: np.ndarray
    labels: tuple[str, ...]
    title: str


def save(picture: Picture) -> None:
    """Writes a PNG, whole or not at all: who looks a row, who is looked at a column.

    Raises:
      InputError: `path` does not end in .png, or cannot be written.
    """
    path, labels = pathlib.Path(picture.path).expanduser(), picture.labels
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
    try:
        with replacing(path) as file:
            file.write(content.getvalue())
    except OSError as error:
        raise InputError(f'{path} cannot be written ({error.strerror}); name another file') from None
