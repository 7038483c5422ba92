"""Write text with a trained GPT.

    python -m gpt_jax.generate --checkpoint=runs/quickstart --prompt='The list' [--num_samples=3 --temperature=0.8 ...]
    python -m gpt_jax.generate --checkpoint=runs/quickstart --interactive
    python -m gpt_jax.generate --checkpoint=runs/quickstart --prompt='The list' --debug

Prompts are that of --prompt, the lines of --prompt_file, or those of standard input. The checkpoint alone is enough: a
workdir of gpt_jax.main (its best step where one is known, else its latest), one checkpoints/STEP folder, or a Hugging
Face directory of GPT-2 or GPT-Neo. A continuation depends on the seed and on its place among prompts and samples, not
on --batch_size.
"""

import sys

from absl import flags

from gpt_jax import cli
from gpt_jax.errors import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string('checkpoint', None, 'a workdir, a checkpoints/STEP folder, or a Hugging Face directory')
flags.DEFINE_integer('step', None, 'which step of the workdir')
flags.DEFINE_string('prompt', None, 'text to continue; empty: starts a new document')
flags.DEFINE_string('prompt_file', None, 'a text file with one prompt a line')
flags.DEFINE_bool('prompt_lines', True, 'one prompt a line; --noprompt_lines: the file or standard input is one prompt')
flags.DEFINE_bool('interactive', False, 'ask for prompts, each continued by itself; Ctrl-D ends')
flags.DEFINE_bool('debug', False, 'go through one prompt token by token, under commands from standard input')
flags.DEFINE_integer('max_new_tokens', None, 'new tokens at most (default: 64, or what fits)')
flags.DEFINE_multi_string('stop', [], 'a text to end before; may be given several times')
flags.DEFINE_bool('allow_sliding', False, 'where the text outgrows the context, go on from its last half')
flags.DEFINE_integer('num_samples', 1, 'continuations of each prompt')
flags.DEFINE_integer('batch_size', 8, 'continuations made at once')
flags.DEFINE_integer('seed', 0, 'of the draws')
flags.DEFINE_enum('cache_dtype', None, ['f32', 'bf16', 'fp16'], "of the key-value cache (default: the checkpoint's)")
flags.DEFINE_bool('json', False, 'print one JSON object a continuation')
flags.DEFINE_bool('echo', True, 'print the prompt before its continuation')
_STRATEGIES = ['greedy', 'sample', 'beam', 'contrastive']
flags.DEFINE_enum('strategy', 'sample', _STRATEGIES, f'one of {", ".join(_STRATEGIES)}')
# Of all strategies.
flags.DEFINE_float('repetition_penalty', 1.0, 'above 1 makes tokens of the text less likely')
flags.DEFINE_integer('no_repeat_ngram_size', 0, 'no so many tokens in a row twice; 0: they may')
flags.DEFINE_multi_string('bad_words', [], 'a word that is never written; may be given several times')
flags.DEFINE_integer('min_new_tokens', 0, 'no end of text before so many new tokens')
# Of sample.
flags.DEFINE_float('temperature', 1.0, 'divides the logits: below 1 is safer, above 1 is wilder')
flags.DEFINE_integer('top_k', 0, 'draw from the k likeliest tokens; 0: from all')
flags.DEFINE_float('top_p', 1.0, 'draw from the likeliest tokens that have this much probability together')
flags.DEFINE_float('min_p', 0.0, 'draw from tokens at least this many times as probable as the likeliest')
flags.DEFINE_float('typical_p', 1.0, 'draw from the most typical tokens that have this much probability together')
flags.DEFINE_integer('best_of', 0, 'draws of each prompt, of which the likeliest are kept; 0: all are')
# Of beam.
flags.DEFINE_integer('num_beams', 4, 'texts followed at once')
flags.DEFINE_float('length_penalty', 1.0, 'scores are divided by length to this power: above 0 favours long texts')
flags.DEFINE_enum('early_stopping', 'false', ['true', 'false', 'never'], 'true: end with num_beams ended texts')
flags.DEFINE_integer('num_beam_groups', 1, 'groups of beams that differ from each other')
flags.DEFINE_float('diversity_penalty', 0.0, 'taken off what a group before has chosen')
# Of contrastive, with top_k candidates (default: 4).
flags.DEFINE_float('penalty_alpha', 0.6, 'weight of being unlike the text against being likely')
# Of greedy and sample, for speed.
flags.DEFINE_string('draft_checkpoint', None, 'a smaller model whose guesses are checked: same texts, sooner')
flags.DEFINE_integer('prompt_lookup', 0, 'guess what followed the last so many tokens before; 0: do not')
flags.DEFINE_integer('draft_tokens', 4, 'how many tokens are guessed at a time')

DEFAULT_NEW_TOKENS = 64


def main() -> None:
    """Generates and prints."""
    if FLAGS.checkpoint is None:
        raise InputError('--checkpoint is missing; give the --workdir of a training run')
    cli.check_exclusive('prompt', 'prompt_file', 'interactive')
    cli.check_exclusive('draft_checkpoint', 'prompt_lookup')
    from gpt_jax import checkpoints, inference

    cli.use_compilation_cache()
    checkpoints.resolve(FLAGS.checkpoint, FLAGS.step)  # a wrong name is told of before a prompt is asked for
    strategy = inference.make_strategy(cli.values(), cli.values(given_alone=True))
    prompts = None if FLAGS.interactive else inference.read_prompts(FLAGS.prompt, FLAGS.prompt_file, FLAGS.prompt_lines)
    ready = checkpoints.load_model(FLAGS.checkpoint, FLAGS.step)
    tokenizer, block_size = ready.tokenizer, ready.model.config.block_size
    strategy = strategy.without_words(tokenizer, FLAGS.bad_words)
    strategy = strategy.with_guesses(tokenizer, FLAGS.draft_tokens, FLAGS.prompt_lookup, FLAGS.draft_checkpoint)
    if FLAGS.debug:
        from gpt_jax.inference import debug

        count = DEFAULT_NEW_TOKENS if FLAGS.max_new_tokens is None else FLAGS.max_new_tokens
        debug.run(ready, prompts, strategy.sampling, count, FLAGS.seed)
        return
    engine = inference.Engine(ready.model, ready.params, cache_dtype=FLAGS.cache_dtype)
    stop = inference.StopStrings(tokenizer, FLAGS.stop) if FLAGS.stop else None
    writer = inference.Writer(sys.stdout, tokenizer, as_json=FLAGS.json, echo=FLAGS.echo, stop=FLAGS.stop)

    def write(prompts: list[str], first: int = 0) -> None:
        tokens = tokenizer.encode_batch(prompts)
        room = block_size if FLAGS.allow_sliding else block_size - max(1, *map(len, tokens))
        count = max(1, min(DEFAULT_NEW_TOKENS, room)) if FLAGS.max_new_tokens is None else FLAGS.max_new_tokens
        ending = inference.Ending(count, tokenizer.end_of_text, stop, FLAGS.allow_sliding)
        watched = {'steps': 1} if writer.is_watched else {}
        updates = inference.continuations(engine, tokens, strategy, ending, first=first, **watched)
        writer.write(prompts, FLAGS.num_samples, updates)
        if strategy.guessing is not None:
            print(strategy.guessing.tally, file=sys.stderr)

    if FLAGS.interactive:
        inference.converse(write)
    else:
        write(prompts)


if __name__ == '__main__':
    cli.run(main, __doc__, cli.own_flags())
