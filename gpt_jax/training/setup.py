"""Everything a run is made of, from its configuration: data, mesh, model, optimizer."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from gpt_jax.config import RunConfig, as_record
from gpt_jax.data import Tokenizer, TrainingData, prepare
from gpt_jax.errors import InputError
from gpt_jax.models import GPT
from gpt_jax.parallel import make_mesh
from gpt_jax.training.init_from import Source
from gpt_jax.training.optimizer import Lengths, lengths, make_optimizer, make_schedule
from gpt_jax.training.recipe import model_config


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The parts of a run that do not change while it goes."""

    run: RunConfig
    workdir: pathlib.Path
    mesh: Mesh
    data: TrainingData
    model: GPT
    lengths: Lengths
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    source: Source | None

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.run.train.batch_size * self.run.model.block_size

    @property
    def document_separator(self) -> int | None:
        """The id that documents are told apart by, where they are to be."""
        return self.data.tokenizer.end_of_text if self.run.data.mask_documents else None

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of itself: enough to use the model, and to know how to go on with the run."""
        return {
            'config': as_record(self.run),
            'model': dataclasses.asdict(self.model.config),
            'tokenizer': self.data.tokenizer.to_json(),
            'tokenizer_fingerprint': self.data.tokenizer.fingerprint,
            'data_fingerprint': self.data.fingerprint,
            'lengths': dataclasses.asdict(self.lengths),
            'init_from': None if self.source is None else self.source.record,
        }


def build(run: RunConfig, workdir: pathlib.Path, recorded: dict[str, Any] | None, log: Callable[[str], None]):
    """The parts of the run, those of a resumed one held against its checkpoint.

    Args:
      run: the experiment.
      workdir: its folder.
      recorded: the `describe()` of the checkpoint that the run goes on from, if any.
      log: takes a line about the preparation of the data.

    Raises:
      InputError: the batch does not fit the mesh, the data cannot be had or are not those of the checkpoint, ...
    """
    mesh = make_mesh(run.mesh)
    check_batch(run, mesh)
    source = None if run.train.init_from is None else Source.find(run.train.init_from, recorded)
    data = prepare(run.data, tokenizer=None if source is None else source.tokenizer, log=log)
    if recorded is not None:
        _check_same_data(data, recorded, workdir)
    windows = sum((len(source.tokens) - 1) // run.model.block_size for source in data.train)
    resolved = lengths(run, windows)
    if recorded is not None:
        # A run whose length is changed keeps the schedule it began with.
        resolved = dataclasses.replace(
            resolved, warmup=recorded['lengths']['warmup'], decay=recorded['lengths']['decay']
        )
    schedule = make_schedule(run, resolved)
    return Experiment(
        run=run,
        workdir=workdir,
        mesh=mesh,
        data=data,
        model=GPT(model_config(run, data.tokenizer.vocab_size)),
        lengths=resolved,
        schedule=schedule,
        optimizer=make_optimizer(run.optimizer, schedule),
        source=source,
    )


def check_batch(run: RunConfig, mesh: Mesh) -> None:
    """Raises InputError where a batch, or its tokens, cannot be divided over the mesh."""
    rows = mesh.shape['data'] * mesh.shape['fsdp']
    where = f'the {rows} devices of mesh.data={mesh.shape["data"]} x mesh.fsdp={mesh.shape["fsdp"]}'
    micro_batch = run.train.batch_size // run.train.accumulation_steps
    if micro_batch % rows:
        raise InputError(
            f'train.batch_size={run.train.batch_size} in {run.train.accumulation_steps} micro-batches of {micro_batch} '
            f'is not divisible by {where}; choose a multiple'
        )
    if run.eval.batch_size is not None and run.eval.batch_size % rows:
        raise InputError(f'eval.batch_size={run.eval.batch_size} is not divisible by {where}; choose a multiple')
    if run.model.block_size % mesh.shape['context']:
        raise InputError(
            f'model.block_size={run.model.block_size} is not divisible by mesh.context={mesh.shape["context"]}'
        )


def _check_same_data(data: TrainingData, recorded: dict[str, Any], workdir: pathlib.Path) -> None:
    way_out = 'restore it, or start anew in another --workdir'
    if data.tokenizer.fingerprint != recorded['tokenizer_fingerprint']:
        raise InputError(f'the tokenizer of this config is not the one that {workdir} was trained with; {way_out}')
    if data.fingerprint != recorded['data_fingerprint']:
        raise InputError(
            f'the corpus is not the one that {workdir} was trained on (fingerprint {data.fingerprint[:12]}, recorded '
            f'{recorded["data_fingerprint"][:12]}; python_docs changes with the Python release); {way_out}'
        )
    path = workdir / 'tokenizer.json'
    if path.exists() and Tokenizer.load(path).fingerprint != recorded['tokenizer_fingerprint']:
        raise InputError(f'{path} does not match the checkpoints beside it; delete it, it will be written anew')


def is_first_process() -> bool:
    """Whether this process is the one that writes logs and prints."""
    return jax.process_index() == 0
