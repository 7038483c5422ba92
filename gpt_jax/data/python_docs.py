"""The embedded corpus: the running Python's own documentation.

One document for each module of the standard library (its docstrings, under headings such as pydoc prints) and one
for each topic of `help('TOPIC')`: a few megabytes of English and code on every machine, without a download. Modules
are parsed, never imported. The text differs a little between Python versions; `fingerprint` says which one it is.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib
import os
import pathlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from gpt_jax.data.corpus import Corpus, Decoder, Part, Passage, by_hash, split_of

SCHEME = 1  # raise it whenever the code below would give other text: it is part of the fingerprint
LEFT_OUT_FOLDERS = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
FRACTION = 0.1  # of the documents, held out


@dataclasses.dataclass(frozen=True)
class PythonDocs(Corpus):
    """The embedded corpus, in one part."""

    fraction: float = FRACTION
    name: str = 'python_docs'

    @property
    def key(self) -> str:
        """The fingerprint."""
        return self.fingerprint

    @property
    def fingerprint(self) -> str:
        """Of the running Python, and what is held out."""
        return hashlib.sha256(f'{library_fingerprint()} {self.fraction}'.encode()).hexdigest()

    @property
    def split_rule(self) -> str:
        """What is held out."""
        return by_hash(self.fraction)

    def parts(self) -> Sequence[Part]:
        """One: it is small."""
        return [Part()]

    def read(self, part: Part, decoder: Decoder) -> Iterator[Passage]:
        """Every document."""
        for text in documents():
            yield Passage(split_of(text, self.fraction), text)

    def source(self) -> dict[str, Any]:
        """Python's version."""
        return {'python': platform.python_version(), 'implementation': platform.python_implementation()}


def library_root() -> pathlib.Path:
    """The folder of the standard library's sources."""
    return pathlib.Path(sysconfig.get_path('stdlib'))


def library_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The library's Python files without tests, installed packages and build records, sorted by their path in it."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS and not name.startswith('config-')]
        # _sysconfigdata_* holds this build's paths and flags and no documentation.
        names = [name for name in files if name.endswith('.py') and not name.startswith('_sysconfigdata')]
        found += [pathlib.Path(folder, name) for name in names]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def library_fingerprint() -> str:
    """Hex sha256 that stands for the text of `documents` without reading it.

    Made of the Python version and the names and sizes of the files, which takes some 50 ms; parsing takes seconds.
    """
    root = library_root()
    digest = hashlib.sha256(f'python_docs {SCHEME} {platform.python_version()}\n'.encode())
    for path in library_files(root):
        digest.update(f'{path.relative_to(root).as_posix()} {path.stat().st_size}\n'.encode())
    return digest.hexdigest()


@functools.cache
def documents() -> tuple[str, ...]:
    """Every document once, in a fixed order: modules by path, then topics by name. Read once in a process."""
    root = library_root()
    modules = (_module_document(path, root) for path in library_files(root))
    texts = (text for text in (*modules, *_topics()) if text)
    # A docstring may hold an escaped lone surrogate, which is not text and cannot be stored as UTF-8.
    return tuple(dict.fromkeys(text for text in texts if _is_utf8(text)))


def _topics() -> Iterator[str]:
    try:
        topics = importlib.import_module('pydoc_data.topics').topics
    except ModuleNotFoundError:  # some distributions strip it; the docstrings still make a corpus
        return
    for name, text in sorted(topics.items()):
        yield f'{name}\n\n{text.strip()}\n'


def _module_document(path: pathlib.Path, root: pathlib.Path) -> str | None:
    """All docstrings of a module under their headings; None where it has none or is not valid Python."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # invalid escapes in old modules; not ours to report
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and files that are broken on purpose
            return None
    name = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')
    sections = list(_sections(tree, name, name))
    return '\n\n'.join(sections) + '\n' if sections else None


def _sections(node: ast.AST, heading: str, qualified_name: str) -> Iterator[str]:
    """Heading and docstring of `node` and of the classes and functions in it, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f'{heading}\n\n{docstring}'
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # what is defined inside a function has no name that help() could be asked for
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            name = f'{qualified_name}.{child.name}'
            bases = ', '.join(ast.unparse(base) for base in child.bases)
            yield from _sections(child, f'class {name}({bases})' if bases else f'class {name}', name)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f'{qualified_name}.{child.name}'
            yield from _sections(child, f'{name}({ast.unparse(child.args)})', name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # definitions under if, try and with
            yield from _sections(child, heading, qualified_name)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
