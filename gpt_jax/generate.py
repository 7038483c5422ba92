"""Write text with a trained GPT.

    python -m gpt_jax.generate --checkpoint=runs/quickstart --prompt='The list' [--num_samples=3 --temperature=0.8 ...]
    python -m gpt_jax.generate --checkpoint=runs/quickstart --interactive
    python -m gpt_jax.generate --checkpoint=runs/quickstart --prompt='The list' --debug

Prompts are that of --prompt, the lines of --prompt_file, or those of standard input. The checkpoint alone is enough: a
workdir of gpt_jax.main (its best step where one is known, else its latest), one checkpoints/STEP folder, or a Hugging
Face directory of GPT-2 or GPT-Neo. A continuation depends on the seed and on its place among prompts and samples, not
on --batch_size.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from gpt_jax import cli
from gpt_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gpt_jax.data import Tokenizer
    from gpt_jax.inference import Sampling, Strategy

FLAGS = flags.FLAGS
flags.DEFINE_string('checkpoint', None, 'a workdir, a checkpoints/STEP folder, or a Hugging Face directory')
flags.DEFINE_integer('step', None, 'which step of the workdir')
cli.define_weights_flag()
flags.DEFINE_string('prompt', None, 'text to continue; empty: starts a new document')
flags.DEFINE_string('prompt_file', None, 'a text file with one prompt a line')
flags.DEFINE_bool('prompt_lines', True, 'one prompt a line; --noprompt_lines: the file or standard input is one prompt')
flags.DEFINE_bool('parse_special', False, 'special tokens such as <|endoftext|> in a prompt are tokens, not text')
flags.DEFINE_bool('interactive', False, 'ask for prompts, each continued by itself; Ctrl-D ends')
flags.DEFINE_bool('debug', False, 'go through one prompt token by token, under commands from standard input')
flags.DEFINE_integer('max_new_tokens', None, 'new tokens at most (default: 64, or what fits)')
flags.DEFINE_multi_string('stop', [], 'a text to end before; may be given several times')
flags.DEFINE_bool('allow_sliding', False, 'where the text outgrows the context, go on from its last half')
flags.DEFINE_integer('num_samples', 1, 'continuations of each prompt')
flags.DEFINE_integer('batch_size', 8, 'continuations made at once')
flags.DEFINE_integer('seed', 0, 'of the draws')
flags.DEFINE_enum('cache_dtype', None, ['f32', 'bf16', 'fp16'], "of the key-value cache (default: the checkpoint's)")
cli.define_mesh_flag()
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
flags.DEFINE_string('draft_checkpoint', None, 'a smaller model whose drafts are checked: same texts, sooner')
flags.DEFINE_integer('prompt_lookup', 0, 'draft what followed the last so many tokens before; 0: do not')
flags.DEFINE_integer('draft_tokens', 4, 'how many tokens are drafted at a time')

DEFAULT_NEW_TOKENS = 64
# Which strategies a flag is for; the others are for all.
_DRAWS, _DRAFTS = ('sample', 'greedy'), ('draft_checkpoint', 'draft_tokens', 'prompt_lookup')
_STRATEGIES_OF = dict.fromkeys(_DRAFTS, _DRAWS) | {
    'top_k': ('sample', 'contrastive'),
    'penalty_alpha': ('contrastive',),
}
_STRATEGIES_OF |= dict.fromkeys(('temperature', 'top_p', 'min_p', 'typical_p'), ('sample',))
_BEAM_FLAGS = ('num_beams', 'length_penalty', 'early_stopping', 'num_beam_groups', 'diversity_penalty')
_STRATEGIES_OF |= dict.fromkeys(_BEAM_FLAGS, ('beam',)) | {'best_of': ('sample',)}
# What --debug, which goes through one text token by token, leaves no room for.
_NOT_IN_DEBUG = ('interactive', 'json', 'num_samples', 'best_of', 'stop', 'allow_sliding', 'mesh')
_NOT_IN_DEBUG += ('draft_checkpoint', 'prompt_lookup')
# What is given empty, by a shell variable that is not set, says what is to be given.
_NOT_EMPTY = {
    'checkpoint': 'the --workdir of a training run',
    'prompt_file': 'a text file',
    'draft_checkpoint': 'the --workdir of a training run, or leave it out',
    'mesh': 'devices, e.g. fsdp:8, or leave it out',
    'bad_words': 'a word, or leave it out',
}


def main() -> None:
    """Generates and prints."""
    if FLAGS.checkpoint is None:
        raise InputError('--checkpoint is missing; give the --workdir of a training run')
    for name, instead in _NOT_EMPTY.items():
        if FLAGS[name].value == '' or (name == 'bad_words' and '' in FLAGS.bad_words):
            raise InputError(f'--{name}= is empty; give {instead}')
    cli.check_exclusive('prompt', 'prompt_file', 'interactive')
    cli.check_exclusive('draft_checkpoint', 'prompt_lookup')
    from gpt_jax import checkpoints, inference

    cli.use_compilation_cache()
    # What is wrong is told of before a prompt is asked for, and before the weights are read.
    if FLAGS.debug:
        _check_debug()
    sampling, strategy, settings = _read_strategy()
    found, mesh = checkpoints.resolve(FLAGS.checkpoint, FLAGS.step, FLAGS.weights), cli.read_mesh()
    prompts = None if FLAGS.interactive else inference.read_prompts(FLAGS.prompt, FLAGS.prompt_file, FLAGS.prompt_lines)
    loaded = checkpoints.load_model(found, mesh=mesh)
    tokenizer, block_size = loaded.tokenizer, loaded.model.config.block_size
    for name in ('stop', 'bad_words'):
        for text in FLAGS[name].value:
            _remark(tokenizer, f'--{name}={text}', [text], parse_special=True)
    sampling = dataclasses.replace(sampling, bad_words_ids=inference.word_ids(tokenizer, FLAGS.bad_words))

    def encode(prompts: list[str]) -> list[list[int]]:
        for prompt in prompts:
            inference.check_prompt(prompt, tokenizer, block_size, FLAGS.allow_sliding)
        source = '--prompt' if FLAGS.prompt is not None else 'standard input'
        _remark(tokenizer, source if FLAGS.prompt_file is None else f'--prompt_file={FLAGS.prompt_file}', prompts)
        return tokenizer.encode_batch(prompts, special=FLAGS.parse_special)

    if FLAGS.debug:
        from gpt_jax.inference import debug

        count = DEFAULT_NEW_TOKENS if FLAGS.max_new_tokens is None else FLAGS.max_new_tokens
        debug.run_debugger(loaded, encode(prompts), sampling, count, FLAGS.seed)
        return
    if FLAGS.draft_checkpoint is not None:
        strategy = _load_draft(tokenizer, mesh)
    layout = {'cache_dtype': FLAGS.cache_dtype, 'mesh': mesh, 'weights': 'take'}
    engine = inference.Engine(loaded.model, loaded.params, tokenizer=tokenizer, **layout)
    stop = inference.StopStrings(tokenizer, FLAGS.stop) if FLAGS.stop else None
    writer = inference.Writer(sys.stdout, tokenizer, as_json=FLAGS.json, echo=FLAGS.echo, stop=FLAGS.stop)
    settings['steps'] = 1 if writer.is_watched else inference.STEPS_AT_A_TIME

    def write(prompts: list[str], first: int = 0) -> None:
        tokens, limited = encode(prompts), sampling
        count = FLAGS.max_new_tokens
        if count is None:
            room = block_size if FLAGS.allow_sliding else block_size - max(1, *map(len, tokens))
            count = max(1, min(max(DEFAULT_NEW_TOKENS, sampling.min_new_tokens), room))
            limited = dataclasses.replace(sampling, min_new_tokens=min(sampling.min_new_tokens, count))
        stopping = inference.StoppingCriteria.of(loaded, count, stop, FLAGS.allow_sliding)
        updates = inference.stream(engine, tokens, limited, stopping, strategy=strategy, first=first, **settings)
        writer.write(prompts, FLAGS.num_samples, updates)
        if isinstance(strategy, inference.Speculative):
            print(strategy.acceptance, file=sys.stderr)

    if FLAGS.interactive:
        inference.prompt_loop(write)
    else:
        write(prompts)


def _remark(tokenizer: 'Tokenizer', name: str, texts: list[str], parse_special: bool | None = None) -> None:
    from gpt_jax import inference

    parse_special = FLAGS.parse_special if parse_special is None else parse_special
    for line in inference.remarks(tokenizer, name, texts, parse_special):
        print(line, file=sys.stderr)


def _read_strategy() -> 'tuple[Sampling, Strategy | None, dict[str, Any]]':
    """What the flags say of how a token is chosen, without words that are not; of a strategy beside it; and of batches.

    Of speculative decoding the draft model is missing. Raises InputError where a value is out of range, or flags do not
    go together, whatever the model.
    """
    from gpt_jax.inference import Beams, BestOf, Contrastive, Sampling, Speculative, StoppingCriteria, StopStrings
    from gpt_jax.inference import check_settings as check

    name, values, given = FLAGS.strategy, cli.values(), cli.values(given_alone=True)
    for flag, strategies in _STRATEGIES_OF.items():
        if flag in given and name not in strategies:
            listed = ' and '.join(strategies)
            raise InputError(f'--{flag}={values[flag]} does not go with --strategy={name}: it is for {listed}')

    def settings(cls, **chosen):
        return cls(**({f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values} | chosen))

    sampling, strategy = settings(Sampling, greedy=name != 'sample'), None
    if name == 'beam':
        early = {'true': True, 'false': False}.get(FLAGS.early_stopping, FLAGS.early_stopping)
        if FLAGS.num_samples > FLAGS.num_beams:
            raise InputError(f'--num_samples={FLAGS.num_samples} exceeds --num_beams={FLAGS.num_beams}; use more beams')
        strategy = settings(Beams, early_stopping=early, num_return_sequences=FLAGS.num_samples)
    elif name == 'contrastive':
        if FLAGS.num_samples > 1:
            raise InputError(
                f'num_samples={FLAGS.num_samples} of a contrastive search would all be the same; ask for 1'
            )
        strategy = settings(Contrastive, **({} if 'top_k' in given else {'top_k': Contrastive.top_k}))
    elif FLAGS.best_of:
        if FLAGS.best_of < FLAGS.num_samples:
            way_out = 'leave it out, or draw at least as many as are kept'
            raise InputError(f'--best_of={FLAGS.best_of} is less than --num_samples={FLAGS.num_samples}; {way_out}')
        if FLAGS.prompt_lookup or FLAGS.draft_checkpoint is not None:
            raise InputError(f'best_of={FLAGS.best_of} does not go with speculative decoding; leave one of them out')
        strategy = BestOf(FLAGS.best_of, FLAGS.num_samples)
    elif FLAGS.prompt_lookup:
        strategy = Speculative(FLAGS.draft_tokens, ngram=FLAGS.prompt_lookup)
    elif FLAGS.draft_checkpoint is not None:
        strategy = Speculative(FLAGS.draft_tokens)
    elif 'draft_tokens' in given:
        way_out = 'give --draft_checkpoint or --prompt_lookup as well'
        raise InputError(f'--draft_tokens={FLAGS.draft_tokens} without anything to draft from; {way_out}')
    stop = StopStrings(None, FLAGS.stop) if FLAGS.stop else None
    most = max(DEFAULT_NEW_TOKENS, sampling.min_new_tokens) if FLAGS.max_new_tokens is None else FLAGS.max_new_tokens
    batches = {'seed': FLAGS.seed, 'batch_size': FLAGS.batch_size}
    check(sampling, StoppingCriteria(most, 0, stop, FLAGS.allow_sliding), num_samples=FLAGS.num_samples, **batches)
    batches['num_samples'] = FLAGS.num_samples if strategy is None or name in _DRAWS else 1
    check(sampling, StoppingCriteria(most, 0, stop, FLAGS.allow_sliding), strategy, **batches)
    return sampling, strategy, batches


def _load_draft(tokenizer: 'Tokenizer', mesh: 'Mesh | None') -> 'Strategy':
    """Speculative decoding with the model of --draft_checkpoint."""
    from gpt_jax import checkpoints, inference

    draft = checkpoints.load_model(FLAGS.draft_checkpoint, mesh=mesh)
    if draft.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f'{FLAGS.draft_checkpoint} has another tokenizer; use a draft that was trained with the same')
    engine = inference.Engine(draft.model, draft.params, tokenizer=draft.tokenizer, mesh=mesh, weights='take')
    return inference.Speculative(FLAGS.draft_tokens, engine)


def _check_debug() -> None:
    for other in _NOT_IN_DEBUG:
        if other in cli.values(given_alone=True):
            raise InputError(f'--debug and --{other} exclude each other; give one of them')
    if FLAGS.strategy not in _DRAWS:
        raise InputError(f'--debug takes one token after another; --strategy={FLAGS.strategy} does not: use sample')
    if FLAGS.prompt is None and FLAGS.prompt_file is None:
        raise InputError('--debug takes commands from standard input; give the text by --prompt or --prompt_file')


if __name__ == '__main__':
    cli.run(main, __doc__, cli.own_flags())
