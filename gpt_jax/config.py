"""Every key of an experiment, with its default and what it means: the one place of a key.

From these dataclasses follow the ConfigDict of an experiment file (`base`), the check of types and ranges, which keys a
resumed run may change (`differing_keys`), which of several keys stand for one length (`LENGTHS`), which come with the
weights of `train.init_from` or `checkpoint.restore_from` (`WEIGHTS_KEYS`), and what `--help_config` prints
(`help_text`).

    from gpt_jax.config import base          # an experiment file, wherever it lies

    def get_config():
        config = base()
        config.model.update(block_size=128, n_layer=4, n_head=6, d_model=192)
        config.train.update(steps=500, batch_size=16)
        return config

A key that is None is unset. `gpt_jax.training.resolve` fills it in: from the preset, from the weights that the run
starts from, from the recipe of `model.version` (those marked "recipe"), or from the default of the model. The command
line wins over the experiment file, and the file over the recipe.
"""

import dataclasses
import hashlib
import math
import numbers
import operator
import pathlib
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections.config_dict import placeholder

from gpt_jax.errors import InputError
from gpt_jax.files import as_path, cache_folder, check_local, is_address

if TYPE_CHECKING:
    from gpt_jax.storage import Address

# Counts the changes of the keys below. A record of a higher number was written by a newer version, whose keys may mean
# something that this one does not know; one of a lower number lacks keys, whose defaults mean what was before them.
FORMAT = 4


def key(
    default: Any,
    doc: str,
    *,
    unset: bool = False,
    resume: bool = False,
    weights: bool = False,
    length: str | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A key of a section.

    Args:
      default: its value where nobody gives one; None: it stays unset until a recipe fills it.
      doc: what it means, with its unit.
      unset: an experiment file leaves it unset although it has a default, so that something else may fill it first.
      resume: whether a resumed run may change it: it says where, when and how something is computed, not what.
      weights: whether `train.init_from` and `checkpoint.restore_from` bring it along.
      length: of the keys of a section with this name only one is set: they are one length in several units.
      least, most: the smallest and the largest number that it may be.
      above, below: the same, but not the number itself.
      choices: the texts that it may be; none: any but the empty one, which is possible only as the default.
    """
    bounds = {'least': least, 'above': above, 'most': most, 'below': below}
    metadata = {'doc': doc, 'unset': unset, 'resume': resume, 'weights': weights, 'length': length}
    metadata |= {'bounds': {word: bound for word, bound in bounds.items() if bound is not None}, 'choices': choices}
    return dataclasses.field(default=default, metadata=metadata)


# Steps, token ids and positions are int32; a table has up to 127 rows of padding besides.
MOST_STEPS = 2**31 - 2
MOST_IDS = 2**31 - 128
# Far beyond any model's, so that a slip of the keyboard does not keep a machine busy; whether a model fits a machine is
# asked before it is built.
MOST_LAYERS, MOST_WIDTH, MOST_EXPANSION = 1000, 2**24, 1024
# Below it float32 has no whole precision, and processors take it for 0.
LEAST_EPSILON = 1e-37
# What is nearer to 1 is 1 in float32, and Adam then divides by 1 - 1.
MOST_BETA = 1 - 2**-24


class _Section:
    """Checks the types and ranges of a section's values when it is made, wherever they come from."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = f'{_section_name(type(self))}.{field.name}'
            value = _checked(name, value, field.type)
            object.__setattr__(self, field.name, value)
            if value is not None and not _is_within(value, field):
                unset = '; None leaves it unset' if field.type is not _plain_type(field.type) else ''
                raise InputError(f'{name}={value!r} must be {_range(field)}{unset}')


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """The architecture, and how its layers are run; what stays unset has the default of `gpt_jax.models.GPTConfig`."""

    version: str = key('gpt2', 'whose recipe fills the unset keys', choices=('gpt2', 'gpt3'))
    preset: str | None = key(None, "a published size, e.g. 'gpt2-small' (gpt_jax/models lists them)")
    vocab_size: int | None = key(None, "unset: the tokenizer's", weights=True, least=1, most=MOST_IDS)
    block_size: int | None = key(None, "context, in tokens; unset: the preset's", weights=True, least=1, most=MOST_IDS)
    n_layer: int | None = key(None, "unset: the preset's", weights=True, least=1, most=MOST_LAYERS)
    n_head: int | None = key(None, "unset: the preset's", weights=True, least=1, most=MOST_WIDTH)
    d_model: int | None = key(None, "unset: the preset's", weights=True, least=1, most=MOST_WIDTH)
    mlp_expansion: int | None = key(
        None,
        "the MLP's width as a multiple of d_model; unset: 4, or n_inner",
        weights=True,
        length='mlp',
        least=1,
        most=MOST_EXPANSION,
    )
    n_inner: int | None = key(
        None,
        "the MLP's width where it is no multiple of d_model; unset: mlp_expansion",
        weights=True,
        length='mlp',
        least=1,
        most=MOST_WIDTH,
    )
    activation: str | None = key(
        'gelu_new', "of the MLP: 'gelu_new' (by tanh), 'gelu' (exact), 'relu', 'silu', ...", unset=True, weights=True
    )
    dropout: float | None = key(None, 'the four rates below, where they are unset (recipe)', least=0, below=1)
    embedding_dropout: float | None = key(None, 'on token + position embeddings', least=0, below=1)
    attention_dropout: float | None = key(None, 'on the attention probabilities', least=0, below=1)
    mlp_dropout: float | None = key(None, "on the MLP's output", least=0, below=1)
    resid_dropout: float | None = key(None, "on the attention's output", least=0, below=1)
    attention_pattern: str | None = key(
        None, "'alternating': with banded layers (recipe)", weights=True, choices=('dense', 'alternating')
    )
    band_size: int | None = key(
        None,
        "tokens that a banded layer's query sees; unset: 256, which no paper gives",
        weights=True,
        least=1,
        most=MOST_IDS,
    )
    qkv_bias: bool | None = key(None, 'of the projections to query, key and value; unset: True', weights=True)
    attention_scale: float | None = key(None, 'on query x key; unset: 1 / sqrt(head width)', weights=True, above=0)
    scale_attn_by_inverse_layer_idx: bool | None = key(
        False, "query x key is also divided by the layer's number, from 1", unset=True, weights=True
    )
    tie_embeddings: bool | None = key(None, 'the output head is the token embedding; unset: True', weights=True)
    layer_norm_epsilon: float | None = key(
        None, 'added to the variance; unset: 1e-5', weights=True, least=LEAST_EPSILON
    )
    remat: str = key(
        'none',
        "made again in the backward pass: 'none' nothing, 'dots' and 'names' some, 'full' all but layer inputs",
        resume=True,
        choices=('none', 'dots', 'names', 'full'),
    )
    scan_layers: bool = key(False, 'one compiled block for all layers: compiles sooner, for deep models', resume=True)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """What is trained on, and how it is cut into tokens."""

    corpus: str = key('python_docs', "a name (docs/DATA.md lists them), or 'hub:REPO[@REVISION][:CONFIG]'")
    # A file may move: the fingerprint of the corpus says whether its text is the same.
    path: str | None = key(
        None, "local text, JSON lines[.gz, .zst], .json or .parquet, also '*.txt', in place of the corpus", resume=True
    )
    mixture: str | None = key(None, "several, with weights, in place of the corpus: 'python_docs:0.7,notes.txt:0.3'")
    column: str = key('text', 'of parquet and JSON lines: where the text stands')
    documents: str = key(
        'whole',
        "plain text is 'whole' (its last tenth held out), or a document a 'file' or 'block' (by blank lines)",
        choices=('whole', 'file', 'block'),
    )
    separator: str | None = key(
        None, "stands between the documents of plain text, e.g. '<|endoftext|>', and is no part of them; unset: nothing"
    )
    validation_fraction: float | None = key(
        None,
        "held out, by the hash of a document; unset: the corpus's own validation split or fraction",
        above=0,
        below=1,
    )
    invalid_bytes: str = key(
        'refuse', "what is no UTF-8: 'replace' puts U+FFFD there, and counts", choices=('refuse', 'replace')
    )
    streaming: bool = key(False, "read the hub's files over the network, keeping none of them", resume=True)
    tokenizer: str | None = key(
        'bpe', "'bpe' (trained on the corpus), 'char', 'gpt2', or a folder with GPT-2's files", unset=True
    )
    vocab_size: int = key(4096, 'tokens of a tokenizer that is trained', least=1, most=MOST_IDS)
    num_workers: int | None = key(
        None, 'processes that prepare a large corpus; unset: one for each core', resume=True, least=1, most=1024
    )
    mask_documents: bool = key(False, 'tokens see their own document alone; positions start again in each')
    cache_dir: str | None = key(
        None, "token shards, a folder or gs://BUCKET/NAME; unset: gpt_jax/data in the user's cache folder", resume=True
    )

    @property
    def cache(self) -> pathlib.Path:
        """The folder where prepared data is kept; with `cache_dir` on object storage, that of its local copies."""
        if (shared := self.shared_cache) is not None:
            return cache_folder('data-of-buckets') / hashlib.sha256(str(shared).encode()).hexdigest()[:16]
        path = self.cache_dir or cache_folder('data')
        check_local(path, f'data.cache_dir={path}')
        try:
            path = pathlib.Path(path).expanduser()
            path.resolve()
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # it is made where data are written
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, links in a loop, a home folder that nobody has
            reason = getattr(error, 'strerror', None) or error
            raise InputError(f'data.cache_dir={path}: cannot be used ({reason}); name another folder') from None
        return path

    @property
    def shared_cache(self) -> 'Address | None':
        """`cache_dir` where that is on object storage, else None."""
        if self.cache_dir is None or not is_address(self.cache_dir):
            return None
        return as_path(self.cache_dir, f'data.cache_dir={self.cache_dir}')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Section):
    """AdamW."""

    learning_rate: float | None = key(None, 'at its peak (recipe)', above=0)
    beta1: float | None = key(None, "Adam's first moment (recipe)", least=0, most=MOST_BETA)
    beta2: float | None = key(None, "Adam's second moment (recipe)", least=0, most=MOST_BETA)
    epsilon: float | None = key(None, "added to Adam's denominator (recipe)", least=LEAST_EPSILON)
    weight_decay: float | None = key(None, 'decoupled; on matrices and embeddings alone (recipe)', least=0)
    clip_norm: float | None = key(None, 'of the global gradient; 0.0: no clipping (recipe)', least=0)
    multipliers: str | None = key(
        None, "on learning rate and decay, by parameter path; later ones win: 'wte:lr=0.5,decay=0;blocks/mlp/.*:lr=2.0'"
    )
    ema_decay: float | None = key(
        None, 'of an average of the parameters, kept beside them; unset: none', resume=True, above=0, below=1
    )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(_Section):
    """The learning rate over the run, and how its batch grows."""

    shape: str = key(
        'cosine',
        "after the warmup; 'wsd': stable, then linear down; 'inverse_sqrt': of the step, with no end",
        choices=('cosine', 'linear', 'wsd', 'constant', 'inverse_sqrt'),
    )
    warmup_steps: int | None = key(
        None, 'linear, from 0 to the peak (recipe)', length='warmup', least=0, most=MOST_STEPS
    )
    warmup_tokens: int | None = key(None, 'the same in tokens (recipe)', length='warmup', least=0)
    warmup_epochs: float | None = key(None, 'the same in epochs of the training split', length='warmup', least=0)
    decay_steps: int | None = key(
        None,
        "where the shape ends, counted from step 0 (recipe, or the run's end)",
        length='decay',
        least=1,
        most=MOST_STEPS,
    )
    decay_tokens: int | None = key(None, 'the same in tokens (recipe)', length='decay', least=1)
    decay_epochs: float | None = key(None, 'the same in epochs of the training split', length='decay', above=0)
    final_fraction: float | None = key(None, 'of the peak: the floor that the shape ends on (recipe)', least=0, most=1)
    cooldown_fraction: float = key(
        0.2, "of 'wsd': the share of all steps up to the decay's end that go down", above=0, most=1
    )
    batch_ramp_tokens: int | None = key(
        None, 'over which the batch grows to train.batch_size, in at most 8 sizes; unset: it does not', least=1
    )
    initial_batch_size: int | None = key(
        None, "sequences of the ramp's first steps; unset: some 32,000 tokens, as GPT-3's", least=1
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """Length, batch and seed."""

    init_from: str | None = key(None, 'a checkpoint or Hugging Face directory to take the first weights from')
    init_weights: str = key('raw', "of that checkpoint; 'ema': their average", choices=('raw', 'ema'))
    steps: int | None = key(
        None, "the run's length: exactly one of these three", length='length', resume=True, least=1, most=MOST_STEPS
    )
    tokens: int | None = key(None, 'the same in tokens', length='length', resume=True, least=1)
    epochs: float | None = key(None, 'the same in epochs of the training split', length='length', resume=True, above=0)
    batch_size: int | None = key(None, 'sequences of block_size tokens a step, over all devices (recipe)', least=1)
    accumulation_steps: int = key(1, 'micro-batches that a step is cut into', least=1, resume=True)
    seed: int = key(0, 'of initialisation, order of the data, dropout and previews', least=0, below=2**32)
    log_every_steps: int = key(
        10, 'rows of metrics.jsonl; the first and the last step have one as well', least=1, resume=True
    )
    max_skipped_in_a_row: int = key(
        10,
        'steps that are skipped (not finite, or a spike) before the run goes back to its last checkpoint, once',
        resume=True,
        least=1,
    )
    spike_loss_deviations: float | None = key(
        None,
        'a loss further above the mean of the window, in its standard deviations, skips its step; unset: never',
        resume=True,
        above=0,
    )
    spike_grad_norm_deviations: float | None = key(None, 'the same of the norm of the gradient', resume=True, above=0)
    spike_window_steps: int = key(
        128, 'the latest steps that were not skipped: what a spike is one of', resume=True, least=2, most=2**20
    )
    norms_every_steps: int = key(
        0, 'rows with the norm of each parameter, its gradient and its update; 0: none', resume=True, least=0
    )
    trackers: str = key(
        'tensorboard', "what is told the rows, such as 'tensorboard,wandb,trackio'; 'none'", resume=True
    )
    hang_seconds: float = key(
        1800.0,
        'without progress, after which a line on standard error says what the run is at; 0.0: never',
        resume=True,
        least=0,
    )
    ends_when_hung: bool = key(
        False, 'the process then ends with status 1, for a loop that starts it again', resume=True
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig(_Section):
    """The validation loss while training."""

    every_steps: int = key(
        500, 'over the whole validation split, and at the end; 0: at the end alone', resume=True, least=0
    )
    batch_size: int | None = key(None, 'sequences; unset: that of a micro-batch', least=1, resume=True)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Section):
    """When to save, what to keep, and which other run to go on from."""

    every_steps: int = key(
        500, 'and at the end, and where validation is best so far; 0: only then', resume=True, least=0
    )
    keep_latest: int = key(1, 'of the newest', least=1, resume=True)
    every_minutes: float = key(
        0.0, 'and where that long passed since the last save; 0.0: never for that', resume=True, least=0
    )
    keep_every_steps: int = key(0, 'every so many steps one is saved for good; 0: none', resume=True, least=0)
    keep_best: int = key(1, 'of the lowest validation loss; 0: none is saved for being best', resume=True, least=0)
    restore_from: str | None = key(
        None, 'another run to go on from, at its step: a workdir (its newest checkpoint) or a checkpoints/STEP folder'
    )
    restore_items: str = key(
        'all',
        "of that run: 'all' (parameters, optimizer, average, counters); 'params' is the same as train.init_from",
        choices=('all', 'params'),
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Section):
    """Devices along each axis; one axis may be -1: whatever the others leave."""

    data: int = key(-1, 'devices that split the batch; -1: all that the other axes leave', resume=True, least=-1)
    fsdp: int = key(1, 'devices that split the batch and the parameters', resume=True, least=-1)
    tensor: int = key(1, 'devices that split heads, MLP width and vocabulary', resume=True, least=-1)
    context: int = key(1, "devices that split a sequence's tokens", resume=True, least=-1)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig(_Section):
    """Of matrix products and activations, and of what is stored between steps."""

    compute: str = key(
        'f32', "products and activations; 'fp16' has dynamic loss scaling", choices=('f32', 'bf16', 'fp16')
    )
    params: str = key(
        'f32', "as stored; 'bf16' is rounded by chance, without bias, after each step", choices=('f32', 'bf16')
    )
    moments: str = key('f32', "Adam's two, as stored; 'bf16' as above", choices=('f32', 'bf16'))


@dataclasses.dataclass(frozen=True)
class PreviewConfig(_Section):
    """What samples.txt shows of the model while it learns."""

    every_steps: int = key(500, 'to samples.txt, and at the end; 0: at the end alone', resume=True, least=0)
    prompt: str = key('', 'of the sampled preview; empty: starts a new document', resume=True)
    max_new_tokens: int = key(64, 'of the sampled preview', least=1, most=100_000, resume=True)
    temperature: float = key(0.8, 'divides the logits', resume=True, above=0)
    top_k: int = key(50, 'likeliest tokens drawn from; 0: all', resume=True, least=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole experiment: a section each. `gpt_jax.training.resolve` leaves nothing of it unset."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    precision: PrecisionConfig
    preview: PreviewConfig

    def check(self) -> None:
        """Raises InputError, naming the keys, where two keys contradict each other."""
        for (section, length), names in LENGTHS.items():
            values = {name: getattr(getattr(self, section), name) for name in names}
            given = [f'{section}.{name}={value}' for name, value in values.items() if value is not None]
            if len(given) > 1:
                raise InputError(f'{" and ".join(given)}: only one of them may be set')
            if not given and length == 'length':
                raise InputError('the length of the run is unset: give one of train.steps, train.tokens, train.epochs')
        batch_size, accumulation_steps = self.train.batch_size, self.train.accumulation_steps
        if batch_size is not None and batch_size % accumulation_steps:
            raise InputError(
                f'train.batch_size={batch_size} is not divisible by train.accumulation_steps={accumulation_steps}'
            )

    def with_one_beginning(self) -> 'RunConfig':
        """The same experiment, in which only one key can say what it begins with.

        `restore_items='params'` is what `train.init_from` does, and becomes it: there is one way to do it.

        Raises:
          InputError: naming the keys, where two of them contradict each other, or one says something of nothing.
        """
        train, checkpoint = self.train, self.checkpoint
        if checkpoint.restore_from is None:
            if checkpoint.restore_items != 'all':
                raise InputError(
                    f'checkpoint.restore_items={checkpoint.restore_items}: of which run? Give checkpoint.restore_from'
                )
            return self
        if train.init_from is not None:
            raise InputError(
                f'train.init_from={train.init_from} and checkpoint.restore_from={checkpoint.restore_from}: a run '
                'begins with the weights of one, or goes on from the other; give one of them'
            )
        if checkpoint.restore_items == 'params':
            return dataclasses.replace(
                self,
                train=dataclasses.replace(train, init_from=checkpoint.restore_from),
                checkpoint=dataclasses.replace(checkpoint, restore_from=None, restore_items='all'),
            )
        if train.init_weights != 'raw':
            raise InputError(
                f'train.init_weights={train.init_weights}: with checkpoint.restore_from the parameters and their '
                'average are both taken; leave it out, or add checkpoint.restore_items=params'
            )
        return self


SECTIONS: dict[str, type[_Section]] = {field.name: field.type for field in dataclasses.fields(RunConfig)}
# (section, key, its field), in the order of the tables above.
FIELDS = tuple((name, field.name, field) for name, cls in SECTIONS.items() for field in dataclasses.fields(cls))
# (section, what it is the length of) -> its keys, of which one stands for the others.
LENGTHS: dict[tuple[str, str], tuple[str, ...]] = {}
for _section, _name, _field in FIELDS:
    if _field.metadata['length']:
        _group = (_section, _field.metadata['length'])
        LENGTHS[_group] = (*LENGTHS.get(_group, ()), _name)
# Keys of the section `model` that come with weights; the others (dropout, remat, scan_layers) are the run's own.
WEIGHTS_KEYS = tuple(name for section, name, field in FIELDS if section == 'model' and field.metadata['weights'])


def base() -> ml_collections.ConfigDict:
    """The experiment that every other one is a change of: all keys with their defaults, None as placeholders.

    It names no model size and no length of the run.
    """
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, name, field in FIELDS:
        is_unset = field.default is None or field.metadata['unset']
        sections[section][name] = placeholder(_plain_type(field.type)) if is_unset else field.default
    return ml_collections.ConfigDict(sections)


def parse(config: 'Mapping[str, Any] | RunConfig') -> RunConfig:
    """The experiment that a ConfigDict (or nested dict) describes, its unset keys None.

    Raises:
      InputError: a key is missing or unknown, its value is of another type or out of range, or two keys say what the
        run begins with.
    """
    if isinstance(config, RunConfig):
        return config.with_one_beginning()
    config = config.to_dict() if hasattr(config, 'to_dict') else config
    _check_names('', config, SECTIONS)
    for section, cls in SECTIONS.items():
        _check_names(f'{section}.', config[section], {field.name: field for field in dataclasses.fields(cls)})
    return RunConfig(**{section: cls(**config[section]) for section, cls in SECTIONS.items()}).with_one_beginning()


def as_dict(run: RunConfig) -> dict[str, dict[str, Any]]:
    """The experiment as nested dicts: section -> key -> value."""
    return dataclasses.asdict(run)


def as_record(run: RunConfig) -> dict[str, Any]:
    """What config.json and a checkpoint hold of a resolved experiment: `as_dict`, and the `format` of its keys."""
    return {'format': FORMAT, **as_dict(run)}


def read_record(record: Mapping[str, Any], where: str = 'the recorded config') -> RunConfig:
    """The experiment of an `as_record`, also of an earlier version: keys that it lacks have their default.

    Args:
      record: as JSON gives it back.
      where: names it in messages.

    Raises:
      InputError: a newer version wrote it, it has a key that none of its version has, or a value of another type.
    """
    record = dict(record)
    number = record.pop('format', 1)  # the first one did not write it
    if not isinstance(number, int) or number > FORMAT:
        raise InputError(
            f'{where} was written by a newer gpt_jax (format {number} of its keys, this one reads up to {FORMAT}); '
            'update gpt_jax'
        )
    sections = {}
    for name in record:
        if name not in SECTIONS or not isinstance(record[name], Mapping):
            raise InputError(f'{where}: {name} is no section of an experiment; restore the file')
    for section, cls in SECTIONS.items():
        names = {field.name for field in dataclasses.fields(cls)}
        for name in record.get(section, {}):
            if name not in names:
                raise InputError(f'{where}: {section}.{name} is not a key of an experiment; restore the file')
        sections[section] = cls(**record.get(section, {}))
    return RunConfig(**sections)


def differing_keys(recorded: Mapping[str, Any], run: RunConfig, where: str = 'the recorded config') -> list[str]:
    """'section.key: old -> new' for every key that differs from an `as_record` and may not on resume.

    Raises:
      InputError: as `read_record`.
    """
    old, new = as_dict(read_record(recorded, where)), as_dict(run)
    return [
        f'{section}.{name}: {old[section][name]} -> {new[section][name]}'
        for section, name, field in FIELDS
        if old[section][name] != new[section][name] and not field.metadata['resume']
    ]


def prefer_overrides(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Unsets, in a ConfigDict, the keys that a command-line override of another of their kind replaces.

    `--config.train.steps=10` on a config that gives `train.epochs` means ten steps, not a contradiction.
    """
    for (section, _), names in LENGTHS.items():
        given = [name for name in names if overrides.get(f'{section}.{name}') is not None]
        for name in names if given else ():
            if name not in given:
                config[section][name] = None


def help_text() -> str:
    """Every key with its type, its default and what it means, section by section."""
    lines = []
    for section, cls in SECTIONS.items():
        lines += ['', f'{section}: {cls.__doc__}']
        for field in dataclasses.fields(cls):
            default = 'unset' if field.default is None or field.metadata['unset'] else repr(field.default)
            resume = '; may change on resume' if field.metadata['resume'] else ''
            lines.append(f'  --config.{section}.{field.name}  ({_plain_type(field.type).__name__}, {default}{resume})')
            limited = field.metadata['choices'] or field.metadata['bounds']
            allowed = f'; {_range(field)}' if limited else ''
            lines += textwrap.wrap(
                field.metadata['doc'] + allowed, 110, initial_indent=' ' * 6, subsequent_indent=' ' * 6
            )
    return '\n'.join(lines[1:])


_TYPE_NAMES = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}


def _checked(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the plain Python type that `annotation` names; raises InputError where it is of another."""
    wanted = _plain_type(annotation)
    if value is None:
        if annotation is not wanted:
            return None
    elif wanted in (bool, str):
        if isinstance(value, wanted):
            return value
    elif not isinstance(value, bool) and isinstance(value, numbers.Integral if wanted is int else numbers.Real):
        # What float32 cannot hold is infinite for the model, and an int64 is the largest whole number of arrays.
        if abs(value) < (2**63 if wanted is int else 2**128):
            return wanted(value)
        if abs(value) < math.inf:
            held = 'int64' if wanted is int else 'float32'
            # Python writes no whole number of more than some thousand digits.
            shown = f'a number of {value.bit_length():,} bits' if isinstance(value, int) else repr(value)
            shown = repr(value) if isinstance(value, int) and value.bit_length() < 256 else shown
            raise InputError(f'{name}={shown} must be {_TYPE_NAMES[wanted]} that {held} holds')
    raise InputError(f'{name}={value!r} must be {_TYPE_NAMES[wanted]}')


def _is_within(value: Any, field: dataclasses.Field) -> bool:
    """Whether a value of the right type is one that its key may have."""
    if isinstance(value, str):
        choices = field.metadata['choices']
        return value in choices if choices else bool(value) or value == field.default
    tests = {'least': operator.ge, 'above': operator.gt, 'most': operator.le, 'below': operator.lt}
    return all(tests[word](value, bound) for word, bound in field.metadata['bounds'].items())


def _range(field: dataclasses.Field) -> str:
    """What a key may be, in words: 'at least 0 and below 1'."""
    if field.metadata['choices']:
        return f'one of {", ".join(field.metadata["choices"])}'
    if _plain_type(field.type) is str:
        return 'a text that is not empty'
    words = {'least': 'at least', 'above': 'above', 'most': 'at most', 'below': 'below'}
    return ' and '.join(f'{words[word]} {bound}' for word, bound in field.metadata['bounds'].items())


def _plain_type(annotation: Any) -> type:
    """int of `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(one for one in typing.get_args(annotation) if one is not types.NoneType)
    return annotation


def _section_name(cls: type[_Section]) -> str:
    return cls.__name__.removesuffix('Config').lower()


def _check_names(prefix: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f'{prefix}{name} is not a key of an experiment; --help_config lists them all')
    for name in known:
        if name not in given:
            raise InputError(f'{prefix}{name} is missing; start from gpt_jax.config.base(), which gives every key')
