"""Perplexity of a text under a trained GPT.

    python -m gpt_jax.evaluate --checkpoint=runs/quickstart --text=book.txt [--stride=64 --batch_size=8 --mesh=fsdp:8]

Prints one JSON object: loss (nats a token), perplexity, bits_per_byte, and the tokens, words and bytes that were
scored: all but the first token, which nothing precedes. Windows of `context` tokens slide over the text by `stride`;
each token is scored once, after at least context - stride + 1 others (those at the start: after all there are).
"""

import json
import pathlib
import sys

import tqdm
from absl import flags

from gpt_jax import cli
from gpt_jax.errors import InputError

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'a workdir, a checkpoints/STEP folder, or a Hugging Face directory'
)
STEP = flags.DEFINE_integer('step', None, 'which step of the workdir')
TEXT = flags.DEFINE_string('text', None, 'a UTF-8 text file; -: standard input')
STRIDE = flags.DEFINE_integer('stride', None, 'tokens from one window to the next (default: half of the context)')
CONTEXT = flags.DEFINE_integer('context', None, 'tokens that a prediction may see (default: block_size, the most)')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'windows at a time; on a mesh rounded up to what it divides')
cli.define_mesh_flag()


def main() -> None:
    """Evaluates and prints."""
    for flag, way_out in (
        (CHECKPOINT, 'the --workdir of a training run'),
        (TEXT, 'a text file, or - for standard input'),
    ):
        if flag.value is None:
            raise InputError(f'--{flag.name} is missing; give {way_out}')
    from gpt_jax import checkpoints, evaluation

    # A wrong name or mesh is told of before a text is waited for.
    found, mesh = checkpoints.resolve(CHECKPOINT.value, STEP.value), cli.read_mesh()
    text = _read_text(TEXT.value)
    cli.use_compilation_cache()
    loaded = checkpoints.load_model(found, mesh=mesh)
    block_size = loaded.model.config.block_size
    context = block_size if CONTEXT.value is None else CONTEXT.value
    if context > block_size:
        raise InputError(f'--context={context} exceeds block_size={block_size}; longer texts need no longer context')
    with tqdm.tqdm(unit=' windows', leave=False, disable=None) as bar:  # none where stderr is no terminal

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        numbers = evaluation.text_perplexity(
            evaluation.model_losses(loaded.model, loaded.params, mesh),
            loaded.tokenizer,
            text,
            context,
            STRIDE.value,
            evaluation.divisible_batch(BATCH_SIZE.value, mesh),
            report,
        )
    if loaded.tokenizer.kind == 'char' and loaded.tokenizer.decode(loaded.tokenizer.encode(text)) != text:
        print('warning: characters that the tokenizer does not know were scored as its unknown token', file=sys.stderr)
    print(json.dumps(numbers))


def _read_text(name: str) -> str:
    try:
        if name == '-':
            if sys.stdin.isatty():
                print('text, ended by Ctrl-D:', file=sys.stderr)
            data = sys.stdin.buffer.read()
        else:
            data = pathlib.Path(name).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f'--text={name} cannot be read ({error.strerror}); name a text file') from None
    if not data:
        raise InputError(f'--text={name} is empty; name a file with text in it')
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        wrong = f'byte 0x{data[error.start]:02x} at offset {error.start}'
        raise InputError(f'--text={name} is not UTF-8 ({wrong}); convert it, e.g. with iconv') from None


if __name__ == '__main__':
    cli.run(main, __doc__, cli.own_flags())
