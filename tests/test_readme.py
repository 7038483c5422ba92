"""The documentation names only what exists: counts, files, flags, keys and links."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from configs import base
from gpt_jax.models import PRESETS

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
README = (ROOT / 'README.md').read_text(encoding='utf-8')
VERBS = ('main', 'generate', 'evaluate', 'prepare', 'convert', 'plan')
# In the README's two tables of switches the first column is the PyTorch suite's.
SUITE_ROW = re.compile(r'^\| (`--|top-p|beam|perplexity|verbose)')

every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose_and_code(page):
    """The lines of a page, the suite's own switches left out."""
    for line in page.read_text(encoding='utf-8').splitlines():
        yield line.split(' | ', 1)[1] if page.name == 'README.md' and SUITE_ROW.match(line) else line


def flags_of(verb):
    """The flags that `python -m gpt_jax.VERB` defines in its source."""
    source = (ROOT / 'gpt_jax' / f'{verb}.py').read_text(encoding='utf-8')
    return set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", source))


def named_flags(page):
    """(verb or None, flag) for each flag of ours that a page names: in our commands, and alone in backticks."""
    for line in prose_and_code(page):
        command = re.search(r'(?:python -m |gpt_jax )gpt_jax\.(\w+) ', line)
        if command:
            for flag in re.findall(r' --(\w[\w-]*)', line[command.end() - 1 :]):
                yield command[1], flag
        for flag in re.findall(r'`--(\w[\w-]*)', line):
            yield None, flag


def test_the_table_of_sizes_is_that_of_the_code():
    rows = re.findall(r'^\| `([\w.-]+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$', README, re.MULTILINE)
    table = {name: tuple(int(number.replace(',', '')) for number in numbers) for name, *numbers in rows}
    assert table == {
        name: (c.n_layer, c.n_head, c.d_model, c.block_size, c.num_parameters) for name, c in PRESETS.items()
    }


def test_every_experiment_stands_in_the_table():
    experiments = {f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')} - {'configs/__init__.py'}
    assert set(re.findall(r'\]\((configs/\w+\.py)\)', README)) == experiments


@every_page
def test_every_named_config_exists(page):
    named = re.findall(r'\bconfigs/(\w+)\.py(?::([\w.]+))?', page.read_text(encoding='utf-8'))
    for name, argument in named:
        module = importlib.import_module(f'configs.{name}')
        if argument and argument != 'SIZE':
            module.get_config(argument)


@every_page
def test_every_named_key_exists(page):
    # A key that does not exist may be named in the message that refuses it.
    text = re.sub(r'`error: .*?`', '', page.read_text(encoding='utf-8'))
    config = base.get_config()
    for section, key in re.findall(r'--config\.([a-z]\w*)\.(\w+)', text):
        assert section in config, f'--config.{section}.{key}'
        assert key in config[section], f'--config.{section}.{key}'


@every_page
def test_every_named_flag_exists(page):
    everywhere = set.union(*map(flags_of, VERBS)) | {'help'}
    for verb, flag in named_flags(page):
        assert flag in (flags_of(verb) | {'config', 'help'} if verb else everywhere), f'--{flag}'


@every_page
def test_every_relative_link_resolves(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
        if not re.match(r'[a-z]+:|#', target):
            assert (page.parent / target.partition('#')[0]).exists(), target


@every_page
def test_every_named_file_of_the_project_exists(page):
    text = page.read_text(encoding='utf-8')
    for name in re.findall(r'`((?:gpt_jax|tests|docs|colab|benchmarks)/[\w/.]+\.\w+)', text):
        assert (ROOT / name).exists(), name


def test_the_architecture_names_every_module():
    text = (ROOT / 'docs' / 'ARCHITECTURE.md').read_text(encoding='utf-8')
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'gpt_jax').rglob('*.py')}
    assert set(re.findall(r'^\| `(gpt_jax/\S+\.py)`', text, re.MULTILINE)) == {
        module for module in modules if not module.endswith('__init__.py')
    }


def test_the_readme_names_every_flag():
    named = {flag for _, flag in named_flags(ROOT / 'README.md')}
    # The only ones with nothing to explain: these two are in --help.
    assert set.union(*map(flags_of, VERBS)) - named <= {'num_samples', 'seed'}


@pytest.mark.slow
def test_the_examples_of_the_model_run():
    example = re.search(r'## From Python\n\n```python\n(.*?)```', README, re.DOTALL)[1]
    result = subprocess.run([sys.executable, '-c', example], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == '774,030,080\n'
