"""A Hugging Face directory into a checkpoint, and a checkpoint into a Hugging Face directory."""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from gpt_jax.checkpoints import foreign, manifest
from gpt_jax.checkpoints.manager import describe_save
from gpt_jax.checkpoints.resolve import load
from gpt_jax.data import Tokenizer
from gpt_jax.data.tokenizer import END_OF_TEXT, UNKNOWN
from gpt_jax.files import new_folder
from gpt_jax.models import GPTConfig, huggingface


def import_huggingface(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Make the checkpoint folder `target`, of step 0, from a Hugging Face directory with its tokenizer.

    Raises InputError, in one line, where the source cannot be used or something stands at `target`.
    """
    source = pathlib.Path(source).expanduser()
    meta = foreign.read_meta(source)
    with new_folder(target) as folder:
        _, params = huggingface.load(source)
        _write_checkpoint(folder, params, meta | describe_save(step=0))


def export_huggingface(
    source: str | os.PathLike, target: str | os.PathLike, step: int | None = None, dtype: str = 'f32'
) -> None:
    """Make a directory that transformers' AutoModelForCausalLM and AutoTokenizer open, from a checkpoint.

    Args:
      source: what `load` takes, with `step`.
      target: a new or an empty folder.
      step: which step of a workdir.
      dtype: of the tensors, 'f32', 'bf16' or 'fp16'.

    Raises:
      InputError: in one line, where the source cannot be used, its architecture is neither GPT-2's nor GPT-Neo's, or
        something stands at `target`.
    """
    with new_folder(target) as folder:
        loaded = load(source, step)
        config, tokenizer = GPTConfig(**loaded.meta['model']), Tokenizer.from_json(loaded.meta['tokenizer'])
        ends = {'bos_token_id': tokenizer.end_of_text, 'eos_token_id': tokenizer.end_of_text}
        huggingface.save(folder, config, loaded.params, dtype, extra=ends)
        (folder / 'tokenizer.json').write_text(tokenizer.to_json(), encoding='utf-8')
        _write_json(folder / 'tokenizer_config.json', _tokenizer_config(tokenizer, config.block_size))
        _write_json(folder / 'generation_config.json', ends | {'pad_token_id': tokenizer.end_of_text})


def _write_checkpoint(folder: pathlib.Path, params: Any, meta: dict[str, Any]) -> None:
    # `Checkpoints` saves in the background and copies everything first; here one array at a time is in flight.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    params_handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1.01 * largest / 1e9)
    handler = ocp.CompositeCheckpointHandler(params=params_handler, meta=ocp.JsonCheckpointHandler())
    items = {'params': ocp.args.StandardSave(params), 'meta': ocp.args.JsonSave(meta)}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.Composite(**items), force=True)
    manifest.write(folder)


def _tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    unknown = UNKNOWN if tokenizer.kind == 'char' else END_OF_TEXT
    return {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': END_OF_TEXT,
        'eos_token': END_OF_TEXT,
        'unk_token': unknown,
        'model_max_length': block_size,
        'clean_up_tokenization_spaces': False,
        # As Tokenizer.encode: a literal <|endoftext|> in a text is cut like any other text.
        'split_special_tokens': True,
    }


def _write_json(path: pathlib.Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + '\n', encoding='utf-8')
