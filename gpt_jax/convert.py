"""Turn a Hugging Face directory into a checkpoint, or a checkpoint into a Hugging Face directory.

    python -m gpt_jax.convert --source=DIR --target=NEW_DIR [--step=N] [--dtype=bf16] [--mesh=fsdp:8]

Which way it goes is found from what the source is. A Hugging Face directory of GPT-2 or GPT-Neo (config.json,
safetensors, tokenizer) becomes one checkpoint folder, which --checkpoint takes. A workdir of gpt_jax.main or a
checkpoint folder becomes a directory that transformers' AutoModelForCausalLM and AutoTokenizer open. The target appears
whole or not at all. --mesh is for a model that one device cannot hold; the files are the same.
"""

import shlex

from absl import flags

from gpt_jax import cli
from gpt_jax.errors import InputError
from gpt_jax.files import as_path, listing

SOURCE = flags.DEFINE_string('source', None, 'a Hugging Face directory, a workdir, or a checkpoints/STEP folder')
TARGET = flags.DEFINE_string('target', None, 'the folder to make: new, or empty')
STEP = flags.DEFINE_integer('step', None, 'which step of the workdir')
WEIGHTS = cli.define_weights_flag()
DTYPE = flags.DEFINE_enum('dtype', None, ['f32', 'bf16', 'fp16'], 'of the Hugging Face tensors (default: f32)')
cli.define_mesh_flag()


def main() -> None:
    """Converts, and prints what into what."""
    for flag in (SOURCE, TARGET):
        if not flag.value:
            raise InputError(f'--{flag.name} is missing; convert one folder into another: --source=DIR --target=DIR')
    from gpt_jax import checkpoints

    found = checkpoints.resolve(SOURCE.value, STEP.value, WEIGHTS.value)
    if found.huggingface:
        if DTYPE.value is not None:
            raise InputError(f'--dtype={DTYPE.value}: parameters of a checkpoint are always f32; leave it out')
        checkpoints.import_huggingface(found.folder, TARGET.value, cli.read_mesh())
        kind, use = 'checkpoint', f'python -m gpt_jax.generate {shlex.quote(f"--checkpoint={TARGET.value}")}'
    else:
        checkpoints.export_huggingface(found, TARGET.value, dtype=DTYPE.value or 'f32', mesh=cli.read_mesh())
        kind, use = 'Hugging Face directory', f'transformers.AutoModelForCausalLM.from_pretrained({TARGET.value!r})'
    size = sum(listing(as_path(TARGET.value).expanduser()).values())
    print(f'{SOURCE.value} -> {kind} {TARGET.value}, {size / 1e6:,.1f} MB. Use it: {use}')


if __name__ == '__main__':
    cli.run(main, __doc__, cli.own_flags())
