"""One way to continue prompts, out of the settings of all strategies."""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpt_jax.checkpoints import load_model
from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference.beam import Beams, beam_search
from gpt_jax.inference.best_of import best_of_n
from gpt_jax.inference.contrastive import Contrastive, contrastive_search
from gpt_jax.inference.decode import STEPS_AT_A_TIME, grow
from gpt_jax.inference.engine import Engine
from gpt_jax.inference.request import Ending, Generation
from gpt_jax.inference.sampling import Sampling, word_ids
from gpt_jax.inference.speculative import Guessing, grow_by_guesses


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How prompts are continued.

    Attributes:
      sampling: how a token is chosen; with another strategy the filters that act in all.
      beams: a beam search, in place of drawing.
      contrastive: a contrastive search, in place of drawing.
      guessing: guesses that greedy decoding and sampling are sped up by; one text at a time.
      best_of: draws of each prompt, of which the `num_samples` likeliest are kept; 0: all are.
      num_samples: continuations of each prompt.
      seed: of the draws.
      batch_size: sequences (where there is a search: prompts) decoded at once.

    Raises:
      InputError: several samples of a contrastive search.
    """

    sampling: Sampling
    beams: Beams | None = None
    contrastive: Contrastive | None = None
    guessing: Guessing | None = None
    best_of: int = 0
    num_samples: int = 1
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self):
        if self.contrastive is not None and self.num_samples > 1:
            raise InputError(f'num_samples={self.num_samples} of a contrastive search would all be the same; ask for 1')
        if self.guessing is not None and self.best_of:
            raise InputError(f'best_of={self.best_of} does not go with speculative decoding; leave one of them out')

    def without_words(self, tokenizer: Tokenizer, words: Sequence[str]) -> 'Strategy':
        """The same, but it never writes these words."""
        sampling = dataclasses.replace(self.sampling, bad_words_ids=word_ids(tokenizer, words))
        return dataclasses.replace(self, sampling=sampling)

    def with_guesses(
        self, tokenizer: Tokenizer, tokens: int, ngram: int, draft_checkpoint: str | None = None
    ) -> 'Strategy':
        """The same by speculative decoding.

        Args:
          tokenizer: of the model; the draft's has to be the same.
          tokens, ngram: see `Guessing`; without a draft an `ngram` of 0 leaves guessing out.
          draft_checkpoint: of a smaller model, or None.
        """
        if draft_checkpoint is None:
            return dataclasses.replace(self, guessing=Guessing(tokens, ngram=ngram)) if ngram else self
        draft = load_model(draft_checkpoint)
        if draft.tokenizer.fingerprint != tokenizer.fingerprint:
            raise InputError(f'{draft_checkpoint} has another tokenizer; use a draft that was trained with the same')
        return dataclasses.replace(self, guessing=Guessing(tokens, Engine(draft.model, draft.params)))


STRATEGIES = ('greedy', 'sample', 'beam', 'contrastive')
_DRAWS = ('temperature', 'top_k', 'top_p', 'min_p', 'typical_p')
# Which strategies a setting is for; the others are for all. Greedy decoding leaves those of draws aside.
_OWNERS = dict.fromkeys(_DRAWS, ('sample', 'greedy')) | {
    field.name: ('beam',) for field in dataclasses.fields(Beams) if field.name != 'num_return_sequences'
}
_OWNERS |= {'top_k': ('sample', 'contrastive', 'greedy'), 'penalty_alpha': ('contrastive',), 'best_of': ('sample',)}
_OWNERS |= dict.fromkeys(('draft_checkpoint', 'draft_tokens', 'prompt_lookup'), ('sample', 'greedy'))


# What `debug`, which goes through one text token by token, leaves no room for.
_NOT_IN_DEBUG = ('interactive', 'json', 'num_samples', 'best_of', 'stop', 'allow_sliding')
_NOT_IN_DEBUG += ('draft_checkpoint', 'prompt_lookup')


def _check_debug(values: Mapping[str, Any], given: Container[str]) -> None:
    for other in _NOT_IN_DEBUG:
        if other in given:
            raise InputError(f'--debug and --{other} exclude each other; give one of them')
    if values['strategy'] not in ('greedy', 'sample'):
        raise InputError(f'--debug takes one token after another; --strategy={values["strategy"]} does not: use sample')
    if values['prompt'] is None and values['prompt_file'] is None:
        raise InputError('--debug takes commands from standard input; give the text by --prompt or --prompt_file')


def make_strategy(values: Mapping[str, Any], given: Container[str] = ()) -> Strategy:
    """The strategy that flags describe.

    Args:
      values: `strategy`, one of STRATEGIES, and settings by the names of their fields, `early_stopping` as a word;
        other keys are left aside.
      given: the settings that were asked for, not left at their defaults.

    Raises:
      InputError: a value is out of range, or one that was asked for does not go with the strategy.
    """
    name = values['strategy']
    if values.get('debug'):
        _check_debug(values, given)
    for setting, owners in _OWNERS.items():
        if setting in given and name not in owners:
            raise InputError(
                f'--{setting}={values[setting]} does not go with --strategy={name}: it is for {_listed(owners)}'
            )

    def settings(cls, **chosen):
        return cls(**({f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values} | chosen))

    beams = contrastive = None
    if name == 'contrastive':
        contrastive = settings(Contrastive, **({} if 'top_k' in given else {'top_k': Contrastive.top_k}))
    if name == 'beam':
        early = {'true': True, 'false': False}.get(values['early_stopping'], values['early_stopping'])
        beams = settings(Beams, early_stopping=early, num_return_sequences=values['num_samples'])
    sampling = settings(Sampling, greedy=name != 'sample')
    return settings(Strategy, sampling=sampling, beams=beams, contrastive=contrastive)


def continuations(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy,
    ending: Ending,
    *,
    first: int = 0,
    steps: int = STEPS_AT_A_TIME,
) -> Iterator[tuple[int, Generation]]:
    """Continues prompts, and gives each continuation as it grows.

    Args:
      engine: the model.
      prompts: token ids; an empty one starts a new document.
      strategy: how they are continued.
      ending: when a continuation is over.
      first: the index of the first prompt, which its draws depend on.
      steps: tokens from one look at a continuation to the next, where the strategy lets it be watched.

    Yields:
      (index of the continuation, it as far as it has grown), all of the first prompt before those of the second; a
      continuation has a `finish_reason` when it is complete.

    Raises:
      InputError: settings or lengths that do not fit together, before anything is yielded.
    """
    at_once = {'batch_size': strategy.batch_size}
    if strategy.beams is not None:
        return _numbered(beam_search(engine, prompts, strategy.beams, ending, strategy.sampling, **at_once))
    if strategy.contrastive is not None:
        found = contrastive_search(engine, prompts, strategy.contrastive, ending, strategy.sampling, **at_once)
        return _numbered([one] for one in found)
    if strategy.guessing is not None:
        settings = {'num_samples': strategy.num_samples, 'seed': strategy.seed, 'first': first, 'rounds': steps}
        return grow_by_guesses(engine, prompts, strategy.guessing, strategy.sampling, ending, **settings)
    draws = at_once | {'seed': strategy.seed, 'first': first}
    if strategy.best_of:
        kept = {'num_return_sequences': strategy.num_samples}
        return _numbered(best_of_n(engine, prompts, strategy.sampling, ending, strategy.best_of, **kept, **draws))
    return grow(engine, prompts, strategy.sampling, ending, num_samples=strategy.num_samples, steps=steps, **draws)


def _numbered(results: Iterable[Sequence[Generation]]) -> Iterator[tuple[int, Generation]]:
    return enumerate(generation for of_prompt in results for generation in of_prompt)


def _listed(strategies: tuple[str, ...]) -> str:
    return ' and '.join(name for name in strategies if name != 'greedy')
