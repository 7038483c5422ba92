"""Imports point down only: the floors of docs/ARCHITECTURE.md, enforced."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'gpt_jax'

# From the ground up; a room may import those below it, and its own modules.
FLOORS = (
    {'parallel'},
    {'models', 'data'},
    {'checkpoints'},
    {'training', 'inference', 'evaluation', 'planning'},
    {'cli'},
)
VERBS = {'main', 'generate', 'evaluate', 'prepare', 'convert', 'plan', 'prove'}
FREE = {'', 'config', 'errors', 'files', 'signals', 'storage'}  # the ground: gpt_jax itself (its version), five modules
# Who alone may import what.
RESERVED = {'ml_collections': VERBS | {'cli', 'config'}, 'absl.flags': VERBS | {'cli'}, 'configs': set()}
FORBIDDEN = {
    'models': {'optax', 'tokenizers', 'orbax', 'grain', 'tensorboardX'},
    'parallel': {'optax', 'tokenizers', 'orbax', 'grain', 'tensorboardX', 'flax'},
}


def rooms():
    names = {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').exists()}
    return names | {path.stem for path in PACKAGE.glob('*.py')} - {'__init__'}


def floor(room):
    return len(FLOORS) if room in VERBS else next(n for n, names in enumerate(FLOORS) if room in names)


def imports(source):
    """The dotted name of all that a module imports, wherever in it; '.' starts a relative one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{"." * node.level}{node.module or ""}.{alias.name}' for alias in node.names)


def violations(room, source):
    """What a module of `room` (a folder, or a module beside them; '': gpt_jax itself) must not import."""
    found = []
    for name in imports(source):
        package, _, rest = name.partition('.')
        target = rest.partition('.')[0]
        if name.startswith('.'):
            found.append(f'{name}: relative')
        elif package != 'gpt_jax':
            reserved = [users for module, users in RESERVED.items() if f'{name}.'.startswith(f'{module}.')]
            if package in FORBIDDEN.get(room, ()) or any(room not in users for users in reserved):
                found.append(f'{name}: not for {room or "gpt_jax"}')
        elif target in rooms() and target not in FREE | {room} and (room in FREE or floor(target) >= floor(room)):
            found.append(f'{name}: not below {room or "gpt_jax"}')
    return found


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    first = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    assert violations('' if first == '__init__' else first, path.read_text(encoding='utf-8')) == []


@pytest.mark.parametrize(
    ('room', 'source'),
    [
        ('training', 'from gpt_jax.inference import generate'),
        ('training', 'from gpt_jax import inference'),
        ('training', 'def f():\n    import gpt_jax.inference.decode'),
        ('models', 'from gpt_jax.data import Tokenizer'),
        ('models', 'from gpt_jax.checkpoints import load'),
        ('models', 'import optax'),
        ('models', 'from tokenizers import Tokenizer'),
        ('parallel', 'from gpt_jax import models'),
        ('data', 'from gpt_jax.training.recipe import resolve'),
        ('errors', 'from gpt_jax.parallel import mesh'),
        ('config', 'from gpt_jax.models import GPTConfig'),
        ('', 'from gpt_jax.models import GPT'),
        ('training', 'from configs import base'),
        ('main', 'import configs.base'),
        ('training', 'from ml_collections import ConfigDict'),
        ('inference', 'from absl import flags'),
        ('generate', 'from gpt_jax import main'),
        ('training', 'from . import config'),
        ('cli', 'from gpt_jax.main import main'),
    ],
)
def test_the_check_sees_an_import_that_points_up_or_aside(room, source):
    assert len(violations(room, source)) == 1


@pytest.mark.parametrize(
    ('room', 'source'),
    [
        ('training', 'from gpt_jax.config import RunConfig\nfrom gpt_jax.checkpoints import Checkpoints'),
        ('training', 'from gpt_jax import __version__\nfrom gpt_jax.errors import InputError\nimport optax'),
        ('main', 'from gpt_jax import cli, inference\nfrom ml_collections import config_flags'),
        ('data', 'import tokenizers'),
    ],
)
def test_the_check_lets_through_what_points_down(room, source):
    assert violations(room, source) == []


def test_every_room_stands_on_a_floor():
    assert rooms() - VERBS - FREE - set().union(*FLOORS) == set()
