"""Perplexity of a text under a trained GPT.

    python -m gpt_jax.evaluate --checkpoint=runs/quickstart --text=book.txt [--stride=64 --batch_size=8 --mesh=fsdp:8]

Prints one JSON object: loss (nats a token), perplexity, bits_per_byte, and the tokens, words and bytes that were
scored: all but the first token, which nothing precedes. Windows of `context` tokens slide over the text by `stride`;
each token is scored once, after at least context - stride + 1 others (those at the start: after all there are).
"""

import json
import sys

import tqdm
from absl import flags

from gpt_jax import cli
from gpt_jax.errors import InputError
from gpt_jax.files import decoded, read_text

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'a workdir, a checkpoints/STEP folder, or a Hugging Face directory'
)
STEP = flags.DEFINE_integer('step', None, 'which step of the workdir')
WEIGHTS = cli.define_weights_flag()
TEXT = flags.DEFINE_string('text', None, 'a UTF-8 text file; -: standard input')
STRIDE = flags.DEFINE_integer('stride', None, 'tokens from one window to the next (default: half of the context)')
CONTEXT = flags.DEFINE_integer('context', None, 'tokens that a prediction may see (default: block_size, the most)')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'windows at a time; on a mesh rounded up to what it divides')
PARSE_SPECIAL = flags.DEFINE_bool(
    'parse_special', False, 'special tokens such as <|endoftext|> in the text are tokens, not text'
)
cli.define_mesh_flag()

MOST_BYTES = 2**28  # of a text, which with its tokens takes some ten times as much memory


def main() -> None:
    """Evaluates and prints."""
    for flag, way_out in (
        (CHECKPOINT, 'the --workdir of a training run'),
        (TEXT, 'a text file, or - for standard input'),
    ):
        if flag.value is None:
            raise InputError(f'--{flag.name} is missing; give {way_out}')
        if not flag.value:
            raise InputError(f'--{flag.name}= is empty; give {way_out}')
    for flag in (STRIDE, CONTEXT, BATCH_SIZE):
        if flag.value is not None and not 1 <= flag.value < 2**31:
            bound = 'at least 1' if flag.value < 1 else f'at most {2**31 - 1}'
            raise InputError(f'--{flag.name}={flag.value} must be {bound}')
    if None not in (STRIDE.value, CONTEXT.value) and STRIDE.value > CONTEXT.value:
        raise InputError(f'--stride={STRIDE.value} exceeds --context={CONTEXT.value}: tokens would be left out')
    from gpt_jax import checkpoints, evaluation, inference

    # A wrong name or mesh is told of before a text is waited for.
    found, mesh = checkpoints.resolve(CHECKPOINT.value, STEP.value, WEIGHTS.value), cli.read_mesh()
    text = _read_text(TEXT.value)
    cli.use_compilation_cache()
    loaded = checkpoints.load_model(found, mesh=mesh)
    block_size = loaded.model.config.block_size
    context = block_size if CONTEXT.value is None else CONTEXT.value
    if context > block_size:
        raise InputError(f'--context={context} exceeds block_size={block_size}; longer texts need no longer context')
    if STRIDE.value is not None and STRIDE.value > context:
        raise InputError(f'--stride={STRIDE.value} must be at most {context=}: tokens would be left out')
    for line in inference.remarks(loaded.tokenizer, f'--text={TEXT.value}', [text], PARSE_SPECIAL.value):
        print(line, file=sys.stderr)
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
            parse_special=PARSE_SPECIAL.value,
        )
    print(json.dumps(numbers, allow_nan=False))


def _read_text(name: str) -> str:
    if name == '-':
        from gpt_jax import inference

        if sys.stdin is not None and sys.stdin.isatty():
            print('text, ended by Ctrl-D:', file=sys.stderr)
        text = decoded(inference.read_standard_input(MOST_BYTES), 'standard input')
    else:
        text = read_text(name, f'--text={name}', MOST_BYTES)
    if not text:
        raise InputError(f'--text={name} is empty; name a file with text in it')
    return text


if __name__ == '__main__':
    cli.run(main, __doc__, cli.own_flags())
