"""A run that starts from the weights of a checkpoint or of a Hugging Face directory: `train.init_from`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import jax

from gpt_jax.data import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.models import GPTConfig

if TYPE_CHECKING:
    from gpt_jax import checkpoints


@dataclasses.dataclass(frozen=True, eq=False)
class StartingWeights:
    """Where a run's first weights are from.

    Attributes:
      path: as `train.init_from` names it.
      model: the architecture of the weights.
      tokenizer: the one they belong to.
      found: the checkpoint on disk; None where a run goes on from its own checkpoints and needs these weights no more.
      record: what the run's checkpoints say of it: `path`, `step` (None for a Hugging Face directory), `model`, and
        `sha256` (`checkpoints.fingerprint`), which is there once the weights were read.
    """

    path: str
    model: GPTConfig
    tokenizer: Tokenizer
    found: 'checkpoints.Resolved | None'
    record: dict[str, Any]

    @classmethod
    def find(cls, path: str, recorded: Mapping[str, Any] | None = None) -> Self:
        """The weights that `path` names, described by the run's own checkpoint where that started from them.

        Args:
          path: a workdir (its best step), a step folder or a Hugging Face directory.
          recorded: the description of the checkpoint that the run goes on from, if any.

        Raises:
          InputError: there is no such checkpoint, or it is damaged, of another architecture or without a tokenizer.
        """
        record = (recorded or {}).get('init_from') or {}
        if record.get('path') == path:
            tokenizer = Tokenizer.from_json(recorded['tokenizer'])
            return cls(path, GPTConfig(**record['model']), tokenizer, None, record)
        from gpt_jax import checkpoints  # orbax takes seconds to import, and most runs start from no weights

        try:
            found = checkpoints.resolve(path)
            meta = checkpoints.read_meta(found)
        except InputError as error:
            raise InputError(f'train.init_from={path}: {error}') from None
        record = {'path': path, 'step': None if found.huggingface else found.step, 'model': meta['model']}
        return cls(path, GPTConfig(**meta['model']), Tokenizer.from_json(meta['tokenizer']), found, record)

    def load(self, block_size: int, shardings: Callable[[Any], Any], log: Callable[[str], None]) -> Any:
        """The parameters, float32, and in `record` what they are.

        Args:
          block_size: positions that are kept, the first ones.
          shardings: from the abstract tree of parameters to the tree of their places.
          log: takes the line that says what was loaded.

        Raises:
          InputError: a file is missing or damaged.
        """
        from gpt_jax import checkpoints

        self.record['sha256'] = checkpoints.fingerprint(self.found)
        try:
            params = checkpoints.load(self.found.folder, sharding=shardings).params
        except InputError as error:
            raise InputError(f'train.init_from={self.path}: {error}') from None
        what = 'a Hugging Face directory' if self.found.huggingface else f'step {self.found.step}'
        positions = len(params['wpe'])
        if block_size < positions:
            what += f', the first {block_size} of its {positions} positions'
            cut = jax.jit(lambda wpe_TD: wpe_TD[:block_size], out_shardings=params['wpe'].sharding)
            params['wpe'] = cut(params['wpe'])
        log(f'weights: {self.path} ({what})')
        return params
