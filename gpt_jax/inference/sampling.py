"""Choosing a token: the settings, the chain of filters that they mean, and drawing.

    chain = Sampling(temperature=0.8, top_p=0.95).chain(vocab_size, ends)
    token_B = chain.choose(keys_B, logits_BV, tokens_BL, lengths_B, new_B)

A chain is a tree of arrays: passed through `jax.jit`, other numbers compile nothing new; another set of filters does.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.inference import filters
from gpt_jax.inference.engine import power_of_two

# With top_k up to the last of these, draws are from so many candidates instead of the whole vocabulary. A program is
# compiled for each that is met, not for each top_k.
CANDIDATES = (64, 256, 1024)
# Tokens that a draw looks at one by one, after it has drawn which of the blocks of the vocabulary it takes them from.
BLOCK = 256

# Beyond these a float32 of the logits overflows, or becomes 0.
TEMPERATURES, PENALTIES = (1e-20, 1e20), (1e-10, 1e10)
LEAST_MASS = 1e-30
LARGEST_INT = 2**31 - 1
LARGEST_SEED = 2**32 - 1

Filter = Callable[[jax.Array], jax.Array]


def check_whole(name: str, value: int, least: int, most: int = LARGEST_INT) -> None:
    """Raises InputError where `value` is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f'{name}={value!r} must be a whole number')
    if not least <= value <= most:
        bound = f'at least {least}' if value < least else f'at most {most}'
        raise InputError(f'{name}={value} must be {bound}')


def check_within(name: str, value: float, least: float, most: float) -> None:
    """Raises InputError where `value` is no number from `least` to `most`."""
    if not least <= value <= most:
        raise InputError(f'{name}={value} must be from {least:g} to {most:g}')


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names are Hugging Face's, and so is the order in which filters act.

    Attributes:
      greedy: take the likeliest; what is said to be of draws is then unused.
      temperature: of draws: divides the logits; above 0.
      top_k: of draws: how many of the likeliest tokens; 0: all.
      top_p: of draws: the smallest set of likeliest tokens with this much probability; in (0, 1].
      min_p: of draws: tokens at least this many times as probable as the likeliest; in [0, 1].
      typical_p: of draws: the smallest set of typical tokens with this much probability; in (0, 1].
      repetition_penalty: above 1 makes tokens of prompt and text less likely; above 0.
      no_repeat_ngram_size: no so many tokens in a row occur twice; 0: they may.
      bad_words_ids: sequences of tokens that are never written; see `word_ids`.
      min_new_tokens: the text does not end before it has so many new tokens.

    Raises:
      InputError: a value is out of range.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0

    def __post_init__(self):
        if not 0 < self.temperature < float('inf'):
            raise InputError(f'temperature={self.temperature} must be above 0; for the likeliest token use greedy')
        check_within('temperature', self.temperature, *TEMPERATURES)
        if self.top_k < 0:
            raise InputError(f'top_k={self.top_k} must be at least 1, or 0 for all tokens')
        check_whole('top_k', self.top_k, 0)
        for name in ('top_p', 'typical_p'):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f'{name}={getattr(self, name)} must be above 0 and at most 1; 1 leaves it out')
        if not 0 <= self.min_p <= 1:
            raise InputError(f'min_p={self.min_p} must be from 0 to 1; 0 leaves it out')
        if not 0 < self.repetition_penalty < float('inf'):
            raise InputError(f'repetition_penalty={self.repetition_penalty} must be above 0; 1 leaves it out')
        check_within('repetition_penalty', self.repetition_penalty, *PENALTIES)
        for name in ('no_repeat_ngram_size', 'min_new_tokens'):
            if getattr(self, name) < 0:
                raise InputError(f'{name}={getattr(self, name)} must be at least 1, or 0 to leave it out')
            check_whole(name, getattr(self, name), 0)
        words = tuple(tuple(int(token) for token in word) for word in self.bad_words_ids)
        if any(not word or min(word) < 0 for word in words):
            raise InputError(f'bad_words_ids={list(words)}: a word is a list of at least one token id from 0 on')
        object.__setattr__(self, 'bad_words_ids', words)

    def chain(self, vocab_size: int, end_of_text: int | Sequence[int]) -> 'Chain':
        """These settings for a model's logits; `end_of_text` is the token that ends a text, or all that do.

        Raises:
          InputError: bad_words_ids has a token that the vocabulary has not.
        """
        for word in self.bad_words_ids:
            if max(word) >= vocab_size:
                raise InputError(f'bad_words_ids: token {max(word)} is not in the vocabulary of {vocab_size} tokens')
        ends = (end_of_text,) if isinstance(end_of_text, int | np.integer) else tuple(end_of_text)
        # As in Hugging Face's, end-of-text cannot be banned: min_new_tokens puts it off.
        words = [word for word in self.bad_words_ids if word not in [(end,) for end in ends]]
        used = {
            'repetition_penalty': self.repetition_penalty != 1,
            'no_repeat_ngram_size': self.no_repeat_ngram_size > 0,
            'bad_words_ids': bool(words),
            'min_new_tokens': self.min_new_tokens > 0,
            'temperature': not self.greedy,
            'top_k': not self.greedy and self.top_k > 0,
            'top_p': not self.greedy and self.top_p < 1,
            'min_p': not self.greedy and self.min_p > 0,
            'typical_p': not self.greedy and self.typical_p < 1,
        }
        numbers = {name: np.float32(getattr(self, name)) for name in ('temperature', 'min_p')}
        # At a mass of 0, which is what rounding would make of less, no token would be left.
        numbers |= {name: np.float32(max(getattr(self, name), LEAST_MASS)) for name in ('top_p', 'typical_p')}
        return Chain(
            **numbers,
            top_k=np.int32(min(self.top_k, vocab_size)),
            repetition_penalty=np.float32(self.repetition_penalty),
            min_new_tokens=np.int32(self.min_new_tokens),
            ends_E=np.array(ends, np.int32),
            bad_words_WN=_word_table(words),
            used=tuple(name for name, is_used in used.items() if is_used),
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            candidates=next((min(count, vocab_size) for count in CANDIDATES if self.top_k <= count), 0),
        )


@flax.struct.dataclass
class Chain:
    """The filters of a `Sampling`, in Hugging Face's order.

    `tokens_BL` and `lengths_B` are the texts so far, as `filters` says; `new_B` is how many tokens of each are new.

    Attributes:
      used: names of the filters that act, in order (static).
      no_repeat_ngram_size: see `Sampling` (static).
      candidates: how many of the likeliest tokens are looked at if top_k is used; 0: all (static).
      ends_E: the tokens that end a text; an array, as the others are: see `Sampling`.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition_penalty: jax.Array
    min_new_tokens: jax.Array
    ends_E: jax.Array
    bad_words_WN: jax.Array
    used: tuple[str, ...] = flax.struct.field(pytree_node=False)
    no_repeat_ngram_size: int = flax.struct.field(pytree_node=False)
    candidates: int = flax.struct.field(pytree_node=False)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return 'temperature' not in self.used

    def is_end(self, tokens: jax.Array) -> jax.Array:
        """Which of the tokens, of any shape, end a text."""
        return jnp.any(tokens[..., None] == jnp.asarray(self.ends_E), axis=-1)

    def processors(self, tokens_BL: jax.Array, lengths_B: jax.Array, new_B: jax.Array) -> list[tuple[str, Filter]]:
        """What acts in every strategy, by name and in order."""
        text = (tokens_BL, lengths_B)
        filters_by_name = {
            'repetition_penalty': lambda x: filters.penalize_repetition(x, *text, self.repetition_penalty),
            'no_repeat_ngram_size': lambda x: filters.ban_repeated_ngrams(x, *text, self.no_repeat_ngram_size),
            'bad_words_ids': lambda x: filters.ban_words(x, *text, jnp.asarray(self.bad_words_WN)),
            'min_new_tokens': lambda x: filters.ban_end_of_text(x, self.ends_E, new_B < self.min_new_tokens),
        }
        return self._in_use(filters_by_name)

    def warpers(self) -> list[tuple[str, Filter]]:
        """What acts on draws alone, after the processors, by name and in order."""
        filters_by_name = {
            'temperature': lambda x: filters.apply_temperature(x, self.temperature),
            'top_k': lambda x: filters.keep_top_k(x, self.top_k),
            'top_p': lambda x: filters.keep_top_p(x, self.top_p),
            'min_p': lambda x: filters.keep_min_p(x, self.min_p),
            'typical_p': lambda x: filters.keep_typical_p(x, self.typical_p),
        }
        return self._in_use(filters_by_name)

    def process(self, logits_BV: jax.Array, tokens_BL: jax.Array, lengths_B: jax.Array, new_B: jax.Array) -> jax.Array:
        """Logits, or log-probabilities, after all processors."""
        return _apply(logits_BV, self.processors(tokens_BL, lengths_B, new_B))

    def warp(self, logits_BV: jax.Array) -> jax.Array:
        """Logits whose softmax is what is drawn from; -inf: never. Unchanged where nothing is drawn."""
        return _apply(logits_BV, self.warpers())

    def choose(
        self, keys_B: jax.Array, logits_BV: jax.Array, tokens_BL: jax.Array, lengths_B: jax.Array, new_B: jax.Array
    ) -> jax.Array:
        """The next token of each row, int32 [batch]; `keys_B` are PRNG keys, one a row.

        Draws follow `process` and `warp`, but of tokens that tie for the last place of top_k only the first are drawn.
        """
        scores_BV = self.process(logits_BV, tokens_BL, lengths_B, new_B)
        if self.greedy:
            return greedy(scores_BV)
        if 'top_k' not in self.used or not self.candidates:
            return categorical(keys_B, self.warp(scores_BV))
        scores_BC, tokens_BC = jax.lax.top_k(scores_BV, self.candidates)
        scores_BC = jnp.where(jnp.arange(self.candidates) < self.top_k, scores_BC, -jnp.inf)
        # They come in order, so that top_k is done; what follows it acts on the few.
        scores_BC = _apply(scores_BC, [(name, warper) for name, warper in self.warpers() if name != 'top_k'])
        chosen_B1 = categorical(keys_B, scores_BC)[:, None]
        return jnp.take_along_axis(tokens_BC, chosen_B1, axis=-1)[:, 0].astype(jnp.int32)

    def _in_use(self, filters_by_name: dict[str, Filter]) -> list[tuple[str, Filter]]:
        return [(name, filter_) for name, filter_ in filters_by_name.items() if name in self.used]


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The likeliest token of each row (the first of equals): int32 [batch]."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def categorical(keys_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """One token for each row, drawn with the row's own key from softmax(logits): int32 [batch].

    First the block of the vocabulary, then the token in it: random bits for a few hundred numbers instead of for all.
    """
    vocab = logits_BV.shape[-1]
    if vocab <= BLOCK:
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -vocab % BLOCK)), constant_values=-jnp.inf)
    blocks_BMV = padded_BV.reshape(logits_BV.shape[0], -1, BLOCK)
    masses_BM = jax.nn.logsumexp(blocks_BMV, axis=-1)

    def draw(key, masses_M, blocks_MV):
        block_key, token_key = jax.random.split(key)
        block = jax.random.categorical(block_key, masses_M)
        return block * BLOCK + jax.random.categorical(token_key, blocks_MV[block])

    return jax.vmap(draw)(keys_B, masses_BM, blocks_BMV).astype(jnp.int32)


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """`bad_words_ids` of words: each at the start of a text, and after a space, where its tokens are others.

    A word with special tokens in it is meant as text and as these tokens. One with characters that the tokenizer does
    not know is never written anyway. Raises InputError where a word is empty.
    """
    if not all(words):
        raise InputError("bad_words='' is no word; give at least one character, or leave it out")
    spellings = [spelling for word in words for spelling in (word, f' {word}')]
    known = [spelling for spelling in spellings if not tokenizer.unknown_characters(spelling)]
    found = [tokenizer.encode(spelling) for spelling in known]
    found += [tokenizer.encode(word, special=True) for word in words if tokenizer.find_special(word)]
    return tuple(dict.fromkeys(map(tuple, found)))


def _apply(logits_BV: jax.Array, named_filters: list[tuple[str, Filter]]) -> jax.Array:
    for _, filter_ in named_filters:
        logits_BV = filter_(logits_BV)
    return logits_BV


def _word_table(words: Sequence[Sequence[int]]) -> np.ndarray:
    """[words, tokens] for `filters.ban_words`, of sizes that are powers of two: few programs."""
    rows = power_of_two(len(words))
    table = np.full((rows, power_of_two(max((len(word) for word in words), default=1))), -1, np.int32)
    for row, word in zip(table, words, strict=False):
        row[len(row) - len(word) :] = word
    return table
