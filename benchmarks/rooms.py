"""What a reader of the code crosses: files and lines of four stories, found by running each and noting whose code ran.

    python benchmarks/rooms.py

Lines are whole files, with docstrings and comments. Beside them stand the figures of karpathy/nanochat for the same
stories, counted by hand.
"""

import os
import pathlib
import sys
import tempfile
import threading

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'gpt_jax'
sys.path.insert(0, str(ROOT))  # configs/ is not installed

NANOCHAT = {
    'the model': '2 files, 750',
    'the train step and its optimizer': 'in the script + 459',
    'the loop: from an experiment to a finished run': '1 file, 604',
    'sampling: from a prompt to text': '1 file, 352',
}


def crossed(story, rooms, without=()):
    """The files of `rooms` (folders or modules of gpt_jax) whose functions run in `story`, but those `without`."""
    files = set()

    def note(frame, event, _):
        if event == 'call' and frame.f_code.co_name != '<module>':
            files.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        story()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    paths = (pathlib.Path(name) for name in files)
    inside = (path.relative_to(PACKAGE) for path in paths if path.is_relative_to(PACKAGE))
    return sorted(path for path in inside if path.parts[0].removesuffix('.py') in rooms and path not in set(without))


def lines(paths):
    return sum(len((PACKAGE / path).read_text(encoding='utf-8').splitlines()) for path in paths)


def main():
    import jax
    import jax.numpy as jnp
    import optax

    from configs import smoke
    from gpt_jax import inference
    from gpt_jax.config import OptimizerConfig
    from gpt_jax.models import GPT2
    from gpt_jax.parallel import MeshConfig, make_mesh
    from gpt_jax.training import train
    from gpt_jax.training.optimizer import make_optimizer
    from gpt_jax.training.step import init_state, make_train_step

    model = GPT2(vocab_size=64, block_size=32, n_layer=2, n_head=2, d_model=32)
    tokens = jnp.zeros((2, 32), jnp.int32)
    params = model.init(jax.random.key(0), tokens)['params']

    def the_model():
        shapes = model.init(jax.random.key(0), tokens)['params']

        def loss(params):
            return model.apply({'params': params}, tokens, tokens, method='token_losses').mean()

        jax.eval_shape(jax.grad(loss), shapes)
        jax.eval_shape(lambda p: model.apply({'params': p}, tokens), shapes)

    def the_step():
        settings = OptimizerConfig(1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0)
        schedule, mesh = optax.constant_schedule(1e-3), make_mesh(MeshConfig(), jax.devices()[:1])
        optimizer = make_optimizer(settings, schedule)
        step = make_train_step(model, optimizer, schedule, mesh)
        step(init_state(model, optimizer, mesh, 0), {'tokens': tokens, 'targets': tokens})

    def the_loop():
        with tempfile.TemporaryDirectory() as folder:
            config = smoke.get_config()
            config.train.steps = 8
            train(config, folder, sample=inference.sample_text)

    def sampling():
        from gpt_jax.inference import Engine, Sampling, StoppingCriteria

        inference.generate(Engine(model, params), [[1, 2, 3]], Sampling(top_k=8), StoppingCriteria(8, end_of_text=0))

    model_files = crossed(the_model, {'models'})
    step_files = crossed(the_step, {'training'})
    recipe = [pathlib.Path('training/recipe.py')]
    found = {
        'the model': model_files,
        'the train step and its optimizer': step_files,
        'the loop: from an experiment to a finished run': crossed(the_loop, {'training'}, [*step_files, *recipe]),
        'sampling: from a prompt to text': crossed(sampling, {'inference'}),
    }
    print('| story | nanochat | gpt_jax | its files |\n|---|---|---|---|')
    for story, paths in found.items():
        names = ', '.join(str(path) for path in paths)
        print(f'| {story} | {NANOCHAT[story]} | {len(paths)} files, {lines(paths):,} | {names} |')
    everything = [path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py')]
    print(f'| all | | {len(everything)} files, {lines(everything):,} | |')


if __name__ == '__main__':
    main()
