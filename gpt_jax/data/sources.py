"""What a run trains on: one corpus, or several in a mixture, all in the ids of one tokenizer."""

import dataclasses
import glob
import pathlib
from collections.abc import Callable, Mapping
from fractions import Fraction

from gpt_jax.config import DataConfig
from gpt_jax.data import corpora, pipeline
from gpt_jax.data.building import PARTS, lock
from gpt_jax.data.encoding import up_to
from gpt_jax.data.manifest import TOKENIZER, digest
from gpt_jax.data.mixture import Source, parse_mixture
from gpt_jax.data.pipeline import Prepared
from gpt_jax.data.tokenizer import Tokenizer, train_bpe, train_char
from gpt_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """All sources of a run.

    Attributes:
      tokenizer: made the tokens of all of them.
      prepared: name -> the source's tokens, in the order in which they were given.
      weights: name -> share of the training rows; they add up to 1.
    """

    tokenizer: Tokenizer
    prepared: Mapping[str, Prepared]
    weights: Mapping[str, Fraction]

    @property
    def fingerprint(self) -> str:
        """Hex sha256: the same one means the same tokens. Of a single source it is its own."""
        prints = [prepared.fingerprint for prepared in self.prepared.values()]
        return prints[0] if len(prints) == 1 else digest(*prints)

    @property
    def train(self) -> tuple[Source, ...]:
        """The training splits, as `Batches` takes them."""
        return tuple(Source(name, self.prepared[name].train, weight) for name, weight in self.weights.items())


def prepare_sources(
    config: DataConfig, tokenizer: Tokenizer | None = None, log: Callable[[str], None] = print
) -> TrainingData:
    """`prepare` for each source of `config.mixture`, or for its one corpus where that is unset.

    A tokenizer that is learned learns from all sources, from as much of each as its weight says.

    Raises InputError where the mixture cannot be read or names what is no corpus and no file, and as `prepare` does.
    """
    data = prepare_sources_piece(config, (1, 1), tokenizer, log)
    assert data is not None  # the only piece is all of it
    return data


def prepare_sources_piece(
    config: DataConfig,
    piece: tuple[int, int],
    tokenizer: Tokenizer | None = None,
    log: Callable[[str], None] = print,
) -> TrainingData | None:
    """`prepare_sources` for one machine's share (see `prepare_piece`); None while parts of other pieces are missing.

    Machines that share no folder need one tokenizer of a mixture: `gpt2`, or a folder that holds it.
    """
    if config.mixture is not None and config.path is not None:
        raise InputError(f'data.path={config.path} beside data.mixture={config.mixture}: name the file in the mixture')
    # A single corpus may be called anything: it is not looked for in the text of a mixture.
    weights = {config.path or config.corpus: Fraction(1)} if config.mixture is None else parse_mixture(config.mixture)
    configs = {name: config if config.mixture is None else _config_of(name, config) for name in weights}
    if config.mixture is not None and tokenizer is None and config.tokenizer in ('bpe', 'char'):
        tokenizer = _shared_tokenizer(config, configs, weights, log)
    prepared = {name: pipeline.prepare_piece(source, piece, tokenizer, log) for name, source in configs.items()}
    if None in prepared.values():
        return None
    return TrainingData(next(iter(prepared.values())).tokenizer, prepared, weights)


def _config_of(name: str, config: DataConfig) -> DataConfig:
    """How to prepare one source of a mixture."""
    if name in corpora.NAMES or name.startswith('hub:'):
        return dataclasses.replace(config, mixture=None, corpus=name)
    if not glob.glob(str(pathlib.Path(name).expanduser()), recursive=True):
        known = ', '.join(known for known in corpora.NAMES if known != 'text')
        raise InputError(
            f'data.mixture={config.mixture}: {name} is no file and no corpus; name {known}, hub:OWNER/NAME or a file'
        )
    return dataclasses.replace(config, mixture=None, corpus='text', path=name)


def _shared_tokenizer(
    config: DataConfig,
    configs: Mapping[str, DataConfig],
    weights: Mapping[str, Fraction],
    log: Callable[[str], None],
) -> Tokenizer:
    """The tokenizer of a mixture, from the cache where it was learned before."""
    loaded = {name: corpora.load(source) for name, source in configs.items()}
    kind = f'bpe-{config.vocab_size}' if config.tokenizer == 'bpe' else 'char'
    parts = (f'{corpus.key} {weights[name]}' for name, corpus in loaded.items())
    cache = config.cache
    folder = cache / f'mixture-{digest(kind, *parts)[:16]}'
    with pipeline.writing(cache):
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        with lock(folder, TOKENIZER):
            if (folder / TOKENIZER).is_file():
                return Tokenizer.load(folder / TOKENIZER)
            log(f'tokenizer: learning {kind} from {", ".join(weights)}')
            resolved = {name: corpus.resolve() for name, corpus in loaded.items()}
            if config.tokenizer == 'char':
                tokenizer = train_char(text for corpus in resolved.values() for text in corpus.documents('train'))
            else:
                limits = {name: int(weight * pipeline.TOKENIZER_TEXT_LIMIT) for name, weight in weights.items()}
                samples = (
                    text for name, corpus in resolved.items() for text in up_to(limits[name], pipeline.sample(corpus))
                )
                tokenizer = train_bpe(samples, config.vocab_size)
            tokenizer.save(folder / TOKENIZER)
            return tokenizer
