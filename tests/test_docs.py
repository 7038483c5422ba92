"""The documentation is true: its commands and Python blocks run; files, flags, keys, links and counts exist.

Every command of README and docs/ runs in a folder that holds what the pages name (`runs/quickstart`, `notes.txt`,
`HF_DIR`, ...). What would take long is cut short by the flags of `stand_ins`; what cannot run here is in `NOT_RUN`.
"""

import collections
import importlib
import io
import json
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from absl import flags

from configs import base
from gpt_jax.config import FIELDS
from gpt_jax.models import PRESETS

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding='utf-8') for page in PAGES}
VERBS = ('main', 'generate', 'evaluate', 'prepare', 'convert', 'plan', 'prove')
# In SUITE.md's two tables of switches the first column is the PyTorch suite's.
SUITE_ROW = re.compile(r'^\| (`--|top-p|beam|perplexity|verbose)')

# Commands that no test runs: how they begin or what they hold, and why.
NOT_RUN = {
    r'python3 -m venv |\. \.venv|pip install ': 'makes the environment that the tests run in; .ci/run does it anew',
    r'docker |mkdir -p runs$': 'needs a Docker engine',
    r'(GPT_JAX_GPT2_FILES=DIR )?(python -m )?pytest( |$)|\.ci/run': 'would run the tests within the tests',
    r'.* --coordinator=': 'needs two hosts; a Python block of SCALING.md runs two processes',
    r'(sbatch |kubectl |TPU=\S+ .*)?launch/|kubectl ': 'needs a cluster; tests/test_launch.py stands in for one',
    r'.*gs://bucket/': 'needs a bucket; tests/storage runs every verb on an emulated one',
    r'.* --weights=ema ': 'needs a run that keeps an average; tests/verbs reads one',
    r'python -m gpt_jax.prove ': 'starts the program again and again; tests/verbs proves a run of its own',
    r'.* --topology=': 'needs libtpu and minutes; tests/verbs compiles a small step where libtpu is there',
}

every_page = pytest.mark.parametrize('page', TEXT)


def blocks(page, language):
    """(source, the text block right after it or None) for each fenced block of a language."""
    pattern = rf'^```{language}\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?'
    return [(match[1], match[2]) for match in re.finditer(pattern, TEXT[page], re.MULTILINE | re.DOTALL)]


def commands():
    """(page, command) for each one of the bash blocks, and each one in backticks that is complete."""
    found = {}
    for page in TEXT:
        for block, _ in blocks(page, 'bash'):
            for line in block.splitlines():
                for command in re.sub(r'\s+# .*', '', line).split(' && '):
                    found.setdefault(command, page)
        for command in re.findall(r'`(python -m gpt_jax\.\w+ [^`]+)`', TEXT[page]):
            if '...' not in command:
                found.setdefault(command, page)
    return [(page, command) for command, page in found.items() if command]


COMMANDS = commands()
RUN = [(page, command) for page, command in COMMANDS if not any(re.match(pattern, command) for pattern in NOT_RUN)]


def stand_ins(verb, arguments):
    """Flags after a command's own, which cut it short: a tiny model, two steps, a small text for a large one."""
    given = ' '.join(arguments)
    keys = {}
    if verb == 'main':
        keys |= {'train.steps': 3 if '--config.train.steps=' in given else 2, 'train.batch_size': 8}
        keys |= {
            'train.accumulation_steps': 1,
            'schedule.warmup_steps': 0,
            'eval.batch_size': 64,
            'preview.max_new_tokens': 4,
        }
    if 'restore_from=' in given:  # beyond the steps of the run that it goes on from
        keys |= {'train.steps': 5}
    if 'batch_ramp_tokens' in given:  # sizes that eight devices can have
        keys |= {'train.batch_size': 16, 'schedule.initial_batch_size': 8}
    if verb == 'main' and 'init_from' not in given:
        keys |= {'model.n_layer': 2, 'model.n_head': 2, 'model.d_model': 32, 'model.block_size': 64}
    if verb in ('main', 'prepare') and 'init_from' not in given:
        keys |= {'data.tokenizer': 'char'}
        if 'data.path=' not in given and 'data.mixture=' not in given:
            keys |= {'data.path': 'notes.txt'}
    if '--config=' not in given:
        return []
    return [f'--config.{key}={value}' for key, value in keys.items()]


def run_command(command):
    """Runs a command of ours in this process and the current folder; returns its exit status."""
    words = shlex.split(command)
    while '=' in words[0]:  # conftest.py has set these variables already
        assert words.pop(0).partition('=')[0] in ('XLA_FLAGS', 'JAX_PLATFORMS'), command
    stdin = io.TextIOWrapper(io.BytesIO())
    if '<' in words:
        stdin = open(words.pop(words.index('<') + 1), encoding='utf-8')  # noqa: SIM115
        words.remove('<')
    assert words[:2] == ['python', '-m'], command
    verb = words[2].removeprefix('gpt_jax.')
    arguments = [word.replace('/path/to/', '') for word in words[3:]]
    defined = set(flags.FLAGS)
    with pytest.MonkeyPatch.context() as patch, stdin:
        patch.setattr(sys, 'argv', [verb, *arguments, *stand_ins(verb, arguments)])
        patch.setattr(sys, 'stdin', stdin)
        try:
            runpy.run_module(words[2], run_name='__main__')
        except SystemExit as exit_:
            return exit_.code or 0
        finally:
            for flag in set(flags.FLAGS) - defined:
                # A library that this command was the first to import defined its flags for good.
                if not flags.FLAGS.find_module_defining_flag(flag, '').startswith('grain.'):
                    delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()


@pytest.fixture(scope='session')
def project(corpus, tiny_gpt2, tmp_path_factory):
    """A folder with all that the pages' commands name, the quickstart's run among it."""
    folder = tmp_path_factory.mktemp('project')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    licence = (ROOT / 'LICENSE').read_text(encoding='utf-8')
    text = licence + corpus.read_text(encoding='utf-8')
    for name in ('LICENSE', 'FILE', 'notes.txt', 'book.txt', 'tinyshakespeare.txt'):
        (folder / name).write_text(text if name != 'LICENSE' else licence, encoding='utf-8')
    (folder / 'prompts.txt').write_text('The first\nThe second\n', encoding='utf-8')
    typed = re.findall(r'^\(debug\) (.*)$', TEXT['docs/DEBUGGING.md'], re.MULTILINE)
    (folder / 'commands.txt').write_text('\n'.join(typed), encoding='utf-8')
    (own,) = [block for block, _ in blocks('docs/TRAINING.md', 'python') if 'def get_config' in block]
    (folder / 'mine.py').write_text(own, encoding='utf-8')
    shutil.copytree(tiny_gpt2, folder / 'HF_DIR')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
        (train,) = [command for page, command in RUN if page == 'README.md' and '--workdir=runs/quickstart' in command]
        assert run_command(train) == 0
    for copy in ('DIR', 'runs/small'):
        shutil.copytree(folder / 'runs' / 'quickstart', folder / copy)
    (manifest,) = (folder / 'cache').rglob('manifest.json')
    shutil.copytree(manifest.parent, folder / 'FOLDER')
    return folder


@pytest.fixture
def copied_project(project, tmp_path, monkeypatch):
    """A copy of it as the current folder, for one test to change."""
    folder = shutil.copytree(project, tmp_path / 'project', symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv('XDG_CACHE_HOME', str(project / 'cache'))  # data and programs are made once
    return folder


def test_every_command_runs_or_is_listed_with_its_reason():
    for page, command in RUN:
        is_ours = re.match(r'([A-Z_]+=\S+ )*python -m gpt_jax\.\w+ ', command)
        assert is_ours, f'{page}: neither one of ours nor in NOT_RUN: {command}'
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for _, command in COMMANDS), f'nothing begins with {pattern}'


def test_the_two_commands_of_the_readme_run(project, copied_project, capfd):
    (write,) = [command for page, command in RUN if page == 'README.md' and 'Return' in command]
    assert run_command(write) == 0
    assert capfd.readouterr().out.startswith('Return ')
    assert (project / 'runs' / 'quickstart' / 'loss.png').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('command', [command for _, command in RUN])
def test_every_command_runs(copied_project, command):
    assert run_command(command) == 0


@pytest.mark.slow
@pytest.mark.parametrize('page', [page for page in TEXT if blocks(page, 'python')])
def test_the_python_of_a_page_runs_from_top_to_bottom(copied_project, page, capsys):
    namespace = {'__name__': page}
    for source, printed in blocks(page, 'python'):
        capsys.readouterr()
        exec(compile(source, page, 'exec'), namespace)
        if printed is not None:
            assert capsys.readouterr().out == printed


def prose_and_code(page):
    """The lines of a page, the suite's own switches left out."""
    for line in TEXT[page].splitlines():
        yield line.split(' | ', 1)[1] if page == 'docs/SUITE.md' and SUITE_ROW.match(line) else line


def named_flags(page):
    """(verb or None, flag) for each flag of ours that a page names: in our commands, and alone in backticks."""
    for line in prose_and_code(page):
        for command in re.finditer(r'(?:python -m |gpt_jax )gpt_jax\.(\w+)( [^`|]*)', line):
            for flag in re.findall(r' --(\w[\w-]*)', command[2]):
                yield command[1], flag
        for flag in re.findall(r'`--(\w[\w-]*)', line):
            yield None, flag


@pytest.fixture(scope='session')
def flags_of():
    """Verb -> the names of its flags, as its --help gives them."""
    found = {}
    for verb in VERBS:
        command = [sys.executable, '-m', f'gpt_jax.{verb}', '--help']
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found[verb] = {'help', *re.findall(r'^  --(\w+): ', printed, re.MULTILINE)}
    return found


@every_page
def test_every_named_flag_exists(page, flags_of):
    everywhere = set.union(*flags_of.values())
    for verb, flag in named_flags(page):
        assert flag in (flags_of[verb] if verb else everywhere), f'--{flag}'


def test_the_pages_name_every_flag(flags_of):
    assert set.union(*flags_of.values()) == {flag for page in TEXT for _, flag in named_flags(page)} | {'help'}


def test_the_tables_of_sizes_are_those_of_the_code():
    row = r'^\| `([\w.-]+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$'
    rows = re.findall(row, TEXT['README.md'] + TEXT['docs/TRAINING.md'], re.MULTILINE)
    table = {name: tuple(int(number.replace(',', '')) for number in numbers) for name, *numbers in rows}
    assert table == {
        name: (c.n_layer, c.n_head, c.d_model, c.block_size, c.num_parameters) for name, c in PRESETS.items()
    }


def test_every_experiment_stands_in_the_table():
    experiments = {f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')} - {'configs/__init__.py'}
    assert set(re.findall(r'\]\(\.\./(configs/\w+\.py)\)', TEXT['docs/TRAINING.md'])) == experiments


def test_the_table_of_resuming_names_the_keys_that_may_differ():
    table = TEXT['docs/TRAINING.md'].partition('| may differ | keys |')[2].partition('\n\n')[0]
    named = [key.replace('*', r'\w+') for key in re.findall(r'`([a-z]+\.[a-z_*]+)`', table)]
    for section, name, field in FIELDS:
        is_named = any(re.fullmatch(key, f'{section}.{name}') for key in named)
        assert is_named == field.metadata['resume'], f'{section}.{name}'


@every_page
def test_every_named_config_exists(page):
    named = re.findall(r'\bconfigs/(\w+)\.py(?::([\w.]+))?', TEXT[page])
    for name, argument in named:
        if name != 'NAME':
            module = importlib.import_module(f'configs.{name}')
            if argument:
                module.get_config(argument)


@every_page
def test_every_named_key_exists(page):
    # A key that does not exist may be named in the message that refuses it.
    text = re.sub(r'`error: .*?`', '', TEXT[page])
    config = base.get_config()
    for section, key in re.findall(r'--config\.([a-z]\w*)\.(\w+)', text):
        assert section in config, f'--config.{section}.{key}'
        assert key in config[section], f'--config.{section}.{key}'


def anchors(text):
    """The anchors that GitHub makes of the headings of a page."""
    seen = collections.Counter()
    prose = re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r'^#+ (.*)$', prose, re.MULTILINE):
        slug = re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        yield f'{slug}-{seen[slug]}' if seen[slug] else slug
        seen[slug] += 1


@every_page
def test_every_link_and_anchor_resolves(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', TEXT[page]):
        if re.match(r'[a-z]+:', target):
            continue
        name, _, anchor = target.partition('#')
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding='utf-8')), target


@every_page
def test_every_named_file_of_the_project_exists(page):
    for name in re.findall(r'`(?:python )?((?:gpt_jax|tests|docs|colab|benchmarks)/[\w/.]+\.\w+)', TEXT[page]):
        assert (ROOT / name).exists(), name


def test_the_architecture_names_every_module_in_its_room():
    rows = re.findall(r'^\| `(gpt_jax\S*)` \|(.*)$', TEXT['docs/ARCHITECTURE.md'], re.MULTILINE)
    named = {f'{room}/{module}' for room, files in rows for module in re.findall(r'`(\w+\.py)`', files)}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'gpt_jax').rglob('*.py')}
    assert named == {module for module in modules if not module.endswith('__init__.py')}


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = set(re.findall(r'\]\((docs/\w+\.md)', TEXT['README.md']))
    assert linked == {page for page in TEXT if page.startswith('docs/')}


def test_the_outputs_of_json_in_the_pages_are_json():
    printed = [text for _, text in blocks('docs/EVALUATING.md', 'bash') if text]
    assert all(json.loads(text)['tokens'] > 0 for text in printed)
