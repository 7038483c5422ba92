"""Settings every test shares: eight simulated CPU devices, caches of its own; and a tiny experiment, run once."""

import atexit
import gc
import importlib.metadata
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import hypothesis
import pytest

# Read when jax starts its backend, so before any test imports it.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Small programs that are compiled often and run briefly: the optimizer of machine code costs more than it gains. Two
# thirds of the tests' time are compilers', and XLA's older way to write a fusion takes them half as long as the newer
# one; jaxlib 0.12 has the newer one alone, and ends the process at a flag that it does not know.
QUICK_COMPILATION = '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    QUICK_COMPILATION += ' --xla_cpu_use_fusion_emitters=false'
os.environ['XLA_FLAGS'] = ' '.join(
    (os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8', QUICK_COMPILATION)
)
os.environ.setdefault('MPLBACKEND', 'agg')
# The same examples in every run: what passed here passes there. `--hypothesis-seed=N` draws others.
hypothesis.settings.register_profile('same', derandomize=True)
hypothesis.settings.load_profile('same')
# One folder of compiled programs for this session, its workers (`-n`) and the processes that it starts: equal ones are
# compiled once.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='gpt_jax-xla-')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.05'
    atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The memory maps of this process. Linux lets it have 65 530 (vm.max_map_count); every compiled program takes some, and
# when none is left XLA crashes.
MAPS = pathlib.Path('/proc/self/maps')
MANY_MAPS = 20_000
sys.path.insert(0, str(ROOT))  # configs/ is not installed

WORDS = ('the', 'a', 'quick', 'brown', 'fox', 'café', 'naïve', 'jumps', 'over', 'dog', 'straße', 'sleeps', 'under')


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a worker for each core, but no more than 8, as each takes 1 to 2 GB."""
    return min(8, os.cpu_count() or 1)


# The files that take longest, all their tests together, with their minutes on one core: the longest first. A worker of
# pytest-xdist that came to one of them last would have the others wait for it.
LONGEST = (
    'training/test_campaign.py',  # 6
    'test_docs.py',  # 5
    'training/test_processes.py',
    'hub/test_hub.py',
    'training/test_every_mesh.py',
    'planning/test_memory.py',
    'parallel/test_processes_together.py',
    'training/test_stored_state.py',
    'training/test_skipping.py',
    'storage/test_bucket_runs.py',
    'training/test_resume.py',
    'verbs/test_generate.py',
    'training/test_init_from.py',
    'training/test_trainer.py',
    'inference/test_engine.py',
    'training/test_step.py',
    'test_notebook.py',
    'inference/test_generate_texts.py',
    'inference/test_speculative.py',
    'verbs/test_main.py',  # 1
)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Has `--dist loadfile` hand out files in our order, and not those with the most tests first."""
    if hasattr(config.option, 'loadscopereorder'):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first."""
    places = {str(ROOT / 'tests' / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


@pytest.fixture(autouse=True, scope='module')
def few_compiled_programs():
    """Forgets compiled programs between files of tests when there are many; what is needed again is read from disk."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b'\n') > MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope='session')
def one_device():
    """Variables of a process that a test starts, which is to have one device, as a user's, and to compile quickly."""
    return {'XLA_FLAGS': QUICK_COMPILATION}


@pytest.fixture(scope='session')
def as_users():
    """Compiler options of a test that reads a program's memory or its fusions: those are written as a user's are."""
    return {'xla_cpu_use_fusion_emitters': True} if 'use_fusion_emitters' in QUICK_COMPILATION else {}


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A text file of some kilobytes, of which a tiny model learns something in few steps."""
    rng = random.Random(0)
    sentences = [' '.join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(200)]
    path = tmp_path_factory.mktemp('corpus') / 'sentences.txt'
    path.write_text('.\n'.join(sentences), encoding='utf-8')
    return path


@pytest.fixture(scope='session')
def tiny_config(corpus, tmp_path_factory):
    """A function: keys as 'section.key' -> a ConfigDict of a run of seconds, with these keys changed."""
    from configs import base

    cache = tmp_path_factory.mktemp('data')

    def make(changes=()):
        config = base.get_config()
        config.model.update(block_size=32, n_layer=2, n_head=2, d_model=32, dropout=0.1)
        config.data.update(path=str(corpus), tokenizer='char', cache_dir=str(cache))
        config.optimizer.learning_rate = 1e-2
        config.schedule.update(warmup_steps=2, final_fraction=0.1)
        config.train.update(steps=6, batch_size=16, log_every_steps=1)
        config.eval.update(every_steps=3, batch_size=16)
        config.checkpoint.every_steps = 3
        config.preview.update(every_steps=3, max_new_tokens=8, prompt='the ')
        config.update_from_flattened_dict(dict(changes))
        return config

    return make


@pytest.fixture(scope='session')
def tiny_gpt2(corpus, tmp_path_factory):
    """A Hugging Face directory: a GPT-2 of random weights whose epsilon is not the usual one, with a BPE tokenizer."""
    import jax
    import numpy as np

    from gpt_jax.data.tokenizer import train_bpe
    from gpt_jax.models import GPTConfig, huggingface

    folder = tmp_path_factory.mktemp('hub') / 'gpt2'
    tokenizer = train_bpe([corpus.read_text(encoding='utf-8')], 300)
    config = GPTConfig(tokenizer.vocab_size, 32, n_layer=2, n_head=2, d_model=32, layer_norm_epsilon=1e-2)
    rng = np.random.default_rng(0)
    shapes = huggingface.parameter_shapes(config)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)
    huggingface.save(folder, config, params)
    tokenizer.save(folder / 'tokenizer.json')
    return folder


@pytest.fixture(scope='session')
def several():
    """A function: a number and a script -> what as many processes of one run print as their last line of JSON.

    The script begins with `index` and `arguments`; jax knows all devices, `devices` of them in each process.
    """

    def run(count, script, *arguments, devices=1, timeout=600):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        head = (
            'import sys, jax\n'
            'index, arguments = int(sys.argv[1]), sys.argv[2:]\n'
            f'jax.config.update("jax_num_cpu_devices", {devices})\n'
            f'jax.distributed.initialize("127.0.0.1:{port}", num_processes={count}, process_id=index)\n'
        )
        environment = os.environ | {'XLA_FLAGS': QUICK_COMPILATION}
        environment['PYTHONPATH'] = os.pathsep.join(path for path in sys.path if path)
        children = [
            subprocess.Popen(
                [sys.executable, '-c', head + script, str(index), *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for index in range(count)
        ]
        try:
            outputs = [child.communicate(timeout=timeout) for child in children]
        finally:
            for child in children:
                child.kill()
        assert [child.returncode for child in children] == [0] * count, outputs
        return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]

    return run


@pytest.fixture(scope='session')
def two_processes(several):
    """`several` for two."""
    return lambda *arguments, **options: several(2, *arguments, **options)


@pytest.fixture(scope='session')
def finished_run(tiny_config, tmp_path_factory):
    """The tiny experiment, run to its end once: what `train` returned. Read it; copy it before changing it."""
    from gpt_jax.inference import sample_text
    from gpt_jax.training import train

    return train(tiny_config(), tmp_path_factory.mktemp('runs') / 'finished', sample=sample_text)
