"""Readers beside a process that saves and removes without a pause: every load succeeds, and is of one step."""

import os
import subprocess
import sys

import pytest

from gpt_jax.checkpoints import load, resolve

WRITER = """if True:
    import sys
    import jax.numpy as jnp
    from gpt_jax.checkpoints import Checkpoints

    folder = sys.argv[1]
    with Checkpoints(folder) as checkpoints:
        step = 0
        while True:
            step += 1
            params = {name: jnp.full((32, 32), float(step)) for name in 'abcdef'}
            # Most are the best so far: those that readers have just chosen go.
            checkpoints.save(step, params, {'mu': params}, {'n': step}, 2.0 if step % 4 == 0 else 1 / step)
            if step == 2:
                checkpoints.wait()
                print('two', flush=True)
"""


@pytest.mark.slow
def test_no_load_fails_while_checkpoints_are_written_and_removed(tmp_path):
    environment = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    environment['PYTHONPATH'] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, '-c', WRITER, str(tmp_path / 'run' / 'checkpoints')]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as writer:
        try:
            assert writer.stdout.readline() == 'two\n', writer.stderr.read()
            steps = set()
            for number in range(100):
                loaded = load(tmp_path / 'run') if number % 2 else load(resolve(tmp_path / 'run' / 'checkpoints'))
                assert {float(leaf[0, 0]) for leaf in loaded.params.values()} == {float(loaded.step)}
                assert loaded.meta['n'] == loaded.step
                steps.add(loaded.step)
            assert len(steps) > 5  # it did go on meanwhile
            assert writer.poll() is None
        finally:
            writer.kill()
