"""Write text with a trained GPT.

    python -m gpt_jax.generate --checkpoint=runs/quickstart --prompt='The list' [--num_samples=3 --temperature=0.8 ...]

The prompt is that of --prompt, or what comes on standard input. The checkpoint alone is enough: a workdir of
gpt_jax.main (its best step where one is known, else its latest), or one checkpoints/STEP folder.
"""

import json
import sys

from absl import flags

from gpt_jax import cli
from gpt_jax.errors import InputError

CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'a workdir, or a checkpoints/STEP folder')
STEP = flags.DEFINE_integer('step', None, 'which step of the workdir')
PROMPT = flags.DEFINE_string('prompt', None, 'text to continue; unset: read from standard input')
STRATEGY = flags.DEFINE_enum('strategy', 'sample', ['greedy', 'sample'], 'how tokens are chosen: greedy or sample')
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'divides the logits: below 1 is safer, above 1 is wilder')
TOP_K = flags.DEFINE_integer('top_k', 0, 'draw from the k likeliest tokens; 0: from all')
TOP_P = flags.DEFINE_float('top_p', 1.0, 'draw from the likeliest tokens that have this much probability together')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', None, 'new tokens at most (default: 64, or what fits)')
NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'continuations to write')
SEED = flags.DEFINE_integer('seed', 0, 'of the draws')
JSON = flags.DEFINE_bool('json', False, 'print one JSON object a sample')

DEFAULT_NEW_TOKENS = 64


def main() -> None:
    """Generates and prints."""
    if CHECKPOINT.value is None:
        raise InputError('--checkpoint is missing; give the --workdir of a training run')
    from gpt_jax import checkpoints, inference

    sampling = inference.Sampling(STRATEGY.value == 'greedy', TEMPERATURE.value, TOP_K.value, TOP_P.value)
    checkpoints.resolve(CHECKPOINT.value, STEP.value)  # a wrong name is told of before the prompt is asked for
    prompt = _read_prompt()
    cli.use_compilation_cache()
    ready = checkpoints.load_model(CHECKPOINT.value, STEP.value)
    model, tokenizer = ready.model, ready.tokenizer
    tokens = tokenizer.encode(prompt)
    room = model.config.block_size - max(len(tokens), 1)
    max_new_tokens = MAX_NEW_TOKENS.value if MAX_NEW_TOKENS.value is not None else max(1, min(DEFAULT_NEW_TOKENS, room))
    results = inference.generate(
        model,
        ready.params,
        tokens,
        max_new_tokens,
        sampling,
        tokenizer.end_of_text,
        NUM_SAMPLES.value,
        SEED.value,
    )
    for index, result in enumerate(results):
        text = tokenizer.decode(result.tokens)
        if JSON.value:
            row = {'prompt': prompt, 'text': text, 'tokens': result.tokens, 'logprobs': result.logprobs}
            print(json.dumps(row | {'finish_reason': result.finish_reason}))
        else:
            print(('' if len(results) == 1 else f'--- sample {index + 1} of {len(results)} ---\n') + prompt + text)


def _read_prompt() -> str:
    if PROMPT.value is not None:
        return PROMPT.value
    if sys.stdin.isatty():
        print('prompt, ended by Ctrl-D:', file=sys.stderr)
    # A final line end is the shell's, not the prompt's.
    return sys.stdin.buffer.read().decode('utf-8', errors='replace').removesuffix('\n')


if __name__ == '__main__':
    cli.run(
        main,
        __doc__,
        (
            'checkpoint',
            'step',
            'prompt',
            'strategy',
            'temperature',
            'top_k',
            'top_p',
            'max_new_tokens',
            'num_samples',
            'seed',
            'json',
        ),
    )
