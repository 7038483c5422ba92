"""Both suite datasets in small, laid out as the hub has them."""

import io
import json
import random

import pyarrow
import pyarrow.parquet
from local_hub import Dataset


def parquet(texts, rows=100, ballast=0):
    """A parquet file of row groups of some rows, with a column before the text that nobody reads.

    Args:
      texts: the column `text`.
      rows: of a row group.
      ballast: bytes a row of the other column, which do not compress.
    """
    file = io.BytesIO()
    other = [random.Random(n).randbytes(ballast) if ballast else n for n in range(len(texts))]
    pyarrow.parquet.write_table(pyarrow.table({'id': other, 'text': texts}), file, row_group_size=rows)
    return file.getvalue()


def words(n):
    return ' '.join(f'word{(n * k) % 97}' for k in range(1, 30))


WEB = [f'Document {n}: {words(n)}.\n\nIt has two paragraphs.' for n in range(400)]


def article_lines(name):
    lines = ['', f' = {name} = \n', '', f' {name} is the first line of its article . \n', '', ' = = Section = = \n', '']
    return [*lines, ' = 1 = 2 = \n', f' {words(len(name))} . \n', '']


def openwebtext_10k():
    """A loading script on the main branch, and the hub's conversion to parquet on another."""
    script = {'README.md': b'---\nlicense: mit\n---\n', 'openwebtext-10k.py': b'raise SystemExit'}
    converted = {'plain_text/train/0000.parquet': parquet(WEB)}
    return Dataset({'main': script, 'refs/convert/parquet': converted})


def wikitext():
    """Three files as Salesforce/wikitext has them; an article goes on in the second."""
    train = [line for name in ('Anarchism', 'Boulter', 'Carp', 'Dollar') for line in article_lines(name)]
    folder = 'wikitext-103-raw-v1'
    files = {
        f'{folder}/train-00000-of-00002.parquet': parquet(train[:14], 5),
        f'{folder}/train-00001-of-00002.parquet': parquet(train[14:], 5),
        f'{folder}/validation-00000-of-00001.parquet': parquet(article_lines('Held out'), 5),
        f'{folder}/test-00000-of-00001.parquet': parquet(article_lines('Never read'), 5),
    }
    files['wikitext-2-v1/train-00000-of-00001.parquet'] = parquet(article_lines('Another config'))
    configs = [
        {
            'config_name': name,
            'data_files': [{'split': split, 'path': f'{name}/{split}-*'} for split in splits],
        }
        for name, splits in (('wikitext-2-v1', ['train']), (folder, ['train', 'validation', 'test']))
    ]
    return Dataset({'main': {'README.md': card(configs), **files}}, {'configs': configs})


def card(configs):
    """A README.md that lists the configs of its dataset."""
    return f'---\nconfigs: {json.dumps(configs)}\n---\n'.encode()
