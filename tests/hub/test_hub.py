"""The hub's own client against a hub of ours: what a user's machine does, but for the distance."""

import csv
import gzip
import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
from local_hub import Dataset
from small_datasets import WEB, article_lines, card, parquet

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'golden' / 'data'
FILE = 'plain_text/train/0000.parquet'


def line(result):
    assert 'error' in result, result
    assert '\n' not in result['error']
    return result['error']


def restored(name):
    return ''.join(row or ' \n' for row in article_lines(name))


def folder_of(tmp_path):
    (folder,) = (tmp_path / 'data').iterdir()
    return folder


@pytest.mark.parametrize('streaming', [False, True])
def test_openwebtext_10k_comes_from_the_hubs_conversion_and_is_split_by_text(hub, run_prepare, tmp_path, streaming):
    result = run_prepare('openwebtext_10k', streaming=streaming)
    train, validation = result['train'], result['validation']
    assert sorted(train + validation) == sorted(WEB)
    assert [text for text in WEB if text in train] == train
    assert 5 <= len(validation) <= 45  # of 400, a twentieth
    source = json.loads((folder_of(tmp_path) / 'manifest.json').read_text())['source']
    assert source['commit'] == hub.datasets['stas/openwebtext-10k'].commit('refs/convert/parquet')
    assert source['revision'] == 'refs/convert/parquet'


def test_wikitext_103_is_whole_articles_with_a_split_of_its_own(run_prepare):
    result = run_prepare('wikitext_103')
    # The blank line that opens the dump belongs to no article, and each article ends with the next one's.
    train = ''.join(map(restored, ('Anarchism', 'Boulter', 'Carp', 'Dollar')))
    assert ''.join(result['train']) == train.removeprefix(' \n')
    assert [text.split('\n')[0] for text in result['train']] == [
        f' = {name} = ' for name in ('Anarchism', 'Boulter', 'Carp', 'Dollar')
    ]
    assert [text.split('\n')[0] for text in result['validation']] == [' = Held out = ']


@pytest.mark.parametrize('streaming', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['openwebtext_10k', 'wikitext_103'])
def test_tokens_are_those_of_the_program_that_read_parquet_by_itself(run_prepare, tmp_path, name, streaming):
    (path,) = [*GOLDEN.glob(f'{name}*/manifest.json'), *GOLDEN.glob(f'{name}-manifest.json')]
    golden = json.loads(path.read_text())
    run_prepare(name, streaming=streaming)
    made = json.loads((folder_of(tmp_path) / 'manifest.json').read_text())
    for key in ('split', 'documents', 'bytes', 'tokens'):
        assert made[key] == golden[key]
    for split, shards in golden['shards'].items():
        assert [(shard['file'], shard['sha256']) for shard in made['shards'][split]] == [
            (shard['file'], shard['sha256']) for shard in shards
        ]


@pytest.mark.slow
def test_the_documents_are_those_that_load_dataset_reads(environment, run_prepare):
    code = (
        'import json, datasets\n'
        "d = datasets.load_dataset('stas/openwebtext-10k', revision='refs/convert/parquet', streaming=True)\n"
        "w = datasets.load_dataset('Salesforce/wikitext', 'wikitext-103-raw-v1')\n"
        "rows = [[row['text'] for row in split] for split in (d['train'], w['train'], w['validation'])]\n"
        'print(json.dumps(rows))'
    )
    command = [sys.executable, '-c', code]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    web, train, validation = json.loads(output.splitlines()[-1])
    ours = run_prepare('openwebtext_10k')
    assert sorted(ours['train'] + ours['validation']) == sorted(web)
    ours = run_prepare('wikitext_103')
    for split, rows in (('train', train), ('validation', validation)):
        assert ''.join(ours[split]) == ''.join(row or ' \n' for row in rows[1:])


@pytest.mark.slow
def test_streaming_reads_ranges_with_the_text_in_them_and_keeps_no_file(hub, run_prepare, tmp_path):
    texts = [f'text {n}' for n in range(100)]
    content = parquet(texts, ballast=500_000)
    hub.datasets['me/large'] = Dataset({'main': {'data/train.parquet': content}})
    result = run_prepare('hub:me/large', streaming=True, validation_fraction=0.3)
    assert sorted(result['train'] + result['validation']) == sorted(texts)
    ranges = [range_.removeprefix('bytes=').split('-') for _, range_ in hub.downloads()]
    # Twice: for the tokenizer and for the tokens.
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < len(content) / 2
    assert not list(tmp_path.glob('hf/hub/datasets--*/snapshots/*/*'))


def test_prepared_data_ask_no_hub(hub, run_prepare):
    first = run_prepare('openwebtext_10k')
    hub.stop()
    second = run_prepare('openwebtext_10k')
    assert second['lines'] == [f'data: reused from {first["folder"]}']
    assert second['fingerprint'] == first['fingerprint']


@pytest.mark.slow
def test_a_preparation_that_goes_on_stays_at_its_commit(hub, run_prepare, tmp_path):
    first = run_prepare('openwebtext_10k')
    revisions = hub.datasets['stas/openwebtext-10k'].revisions
    old = hub.datasets['stas/openwebtext-10k'].commit('refs/convert/parquet')
    revisions['old'] = dict(revisions['refs/convert/parquet'])  # still there, as the hub keeps every commit
    revisions['refs/convert/parquet'] = {FILE: parquet(['Other text.'] * 50)}
    (folder_of(tmp_path) / 'manifest.json').unlink()
    (folder_of(tmp_path) / 'train-00000.bin').unlink()
    shutil.rmtree(tmp_path / 'hf')
    assert run_prepare('openwebtext_10k')['fingerprint'] == first['fingerprint']
    shutil.rmtree(tmp_path / 'data')
    assert 'empty' in line(run_prepare('openwebtext_10k'))  # the new commit: one text fifty times, in one split
    pinned = run_prepare(f'hub:stas/openwebtext-10k@{old}:plain_text', validation_fraction=0.05)
    assert pinned['fingerprint'] == first['fingerprint']


def test_a_hub_that_is_down_is_one_line_without_waiting_for_it(hub, run_prepare, tmp_path):
    hub.stop()
    result = run_prepare('openwebtext_10k')
    for part in (
        'data.corpus=openwebtext_10k',
        'stas/openwebtext-10k',
        'HF_HUB_OFFLINE',
        'data.path',
        'data.cache_dir',
    ):
        assert part in line(result)
    assert result['waited'] == 0
    assert not list(tmp_path.glob('data/*/*.bin'))


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(run_prepare, environment):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        environment['HF_ENDPOINT'] = f'http://127.0.0.1:{silent.getsockname()[1]}'
        assert 'HF_HUB_OFFLINE' in line(run_prepare('openwebtext_10k'))


def test_offline_is_one_line(run_prepare, environment):
    environment['HF_HUB_OFFLINE'] = '1'
    assert 'see that HF_HUB_OFFLINE is not set' in line(run_prepare('openwebtext_10k'))


@pytest.mark.slow
@pytest.mark.parametrize('streaming', [False, True])
def test_a_download_that_breaks_off_is_tried_again(hub, run_prepare, streaming):
    hub.breaks = 1
    result = run_prepare('openwebtext_10k', streaming=streaming)
    assert sorted(result['train'] + result['validation']) == sorted(WEB)
    assert hub.breaks == 0


@pytest.mark.slow
@pytest.mark.parametrize('streaming', [False, True])
def test_a_download_that_always_breaks_off_leaves_nothing_half_and_goes_on_later(hub, run_prepare, tmp_path, streaming):
    hub.breaks = 10**6
    result = run_prepare('openwebtext_10k', streaming=streaming, hurry=True)
    assert 'cannot read hub:stas/openwebtext-10k' in line(result)
    assert not list(tmp_path.glob('data/*/*.bin'))
    assert not list(tmp_path.glob('data/*/manifest.json'))
    hub.breaks = 0
    result = run_prepare('openwebtext_10k', streaming=streaming)
    assert sorted(result['train'] + result['validation']) == sorted(WEB)


def test_what_the_hub_does_not_have_is_refused_by_name(hub, run_prepare):
    assert 'hub:no/such' in line(run_prepare('hub:no/such'))
    message = line(run_prepare('hub:Salesforce/wikitext'))
    assert 'several configs' in message
    assert 'wikitext-103-raw-v1' in message
    assert "no config 'wikitext-1'" in line(run_prepare('hub:Salesforce/wikitext:wikitext-1'))
    message = line(run_prepare('hub:Salesforce/wikitext:wikitext-2-v1', column='body'))
    assert 'data.column=body' in message
    assert 'only id, text' in message


def lines_file():
    """WEB as JSON lines, with a row without text among them."""
    rows = [{'id': n, 'text': text} for n, text in enumerate(WEB)]
    return '\n'.join(map(json.dumps, [*rows, {'id': 400, 'text': None}])).encode()


def csv_file():
    """WEB as a table with a column before the text."""
    file = io.StringIO()
    csv.writer(file).writerows([('id', 'text'), *enumerate(WEB)])
    return file.getvalue().encode()


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize(
    ('path', 'content'),
    [
        ('data/train.jsonl', lines_file()),
        ('train.csv', csv_file()),
        pytest.param('train.jsonl.gz', gzip.compress(lines_file(), mtime=0), marks=pytest.mark.slow),
    ],
)
def test_every_format_that_datasets_reads_comes_to_the_same_tokens(
    hub, run_prepare, tmp_path, path, content, streaming
):
    hub.datasets['me/data'] = Dataset({'main': {path: content}})
    result = run_prepare('hub:me/data', validation_fraction=0.1, streaming=streaming)
    assert sorted(result['train'] + result['validation']) == sorted(WEB)
    assert [text for text in WEB if text in result['train']] == result['train']
    source = json.loads((folder_of(tmp_path) / 'manifest.json').read_text())['source']
    assert source['commit'] == hub.datasets['me/data'].commit('main')
    assert source['format'] == ('csv' if 'csv' in path else 'json')
    kept = list(tmp_path.glob('hf/hub/datasets--me--data/snapshots/*/**/train.*'))
    assert len(kept) == (0 if streaming else 1)
    assert not list(tmp_path.glob('hf/datasets/**/*.arrow'))  # no second copy of the text


def test_what_a_card_says_of_its_format_is_heeded(hub, run_prepare):
    configs = [{'config_name': 'default', 'data_files': 'table.csv', 'sep': ';'}]
    table = 'id;text\n' + ''.join(f'{n};{text.splitlines()[0]}\n' for n, text in enumerate(WEB))
    hub.datasets['me/table'] = Dataset({'main': {'table.csv': table.encode()}}, {'configs': configs})
    hub.datasets['me/table'].revisions['main']['README.md'] = card(configs)
    result = run_prepare('hub:me/table', validation_fraction=0.1)
    assert sorted(result['train'] + result['validation']) == sorted(text.splitlines()[0] for text in WEB)


@pytest.mark.slow
def test_what_datasets_cannot_read_is_read_from_the_hubs_conversion_unless_that_is_a_part(hub, run_prepare):
    script = {'script.py': b'raise SystemExit', 'a.bin': b'x'}
    hub.datasets['me/script'] = Dataset(
        {'main': script, 'refs/convert/parquet': {'default/train/0000.parquet': parquet(WEB)}}
    )
    assert len(run_prepare('hub:me/script', validation_fraction=0.1)['train']) > 300
    hub.datasets['me/huge'] = Dataset(
        {'main': {'a.bin': b'x'}, 'refs/convert/parquet': {'default/partial-train/0000.parquet': parquet(WEB)}}
    )
    message = line(run_prepare('hub:me/huge'))
    assert 'first 5 GB' in message
    assert 'hub:me/huge@refs/convert/parquet' in message
    hub.datasets['me/none'] = Dataset({'main': {'a.bin': b'x'}, 'refs/convert/parquet': {}})
    assert 'no files to train on' in line(run_prepare('hub:me/none'))


@pytest.mark.slow
@pytest.mark.parametrize('streaming', [False, True])
def test_row_groups_of_a_file_are_shared_by_workers_and_come_back_in_order(hub, run_prepare, tmp_path, streaming):
    hub.datasets['me/large'] = Dataset({'main': {'train.parquet': parquet(WEB, rows=30)}})
    one = run_prepare('hub:me/large', validation_fraction=0.1, streaming=streaming)
    shutil.rmtree(tmp_path / 'data')
    several = run_prepare('hub:me/large', part_bytes=5000, validation_fraction=0.1, streaming=streaming, num_workers=2)
    assert several['train'] == one['train']
    assert several['validation'] == one['validation']
    assert several['fingerprint'] == one['fingerprint']
    assert len(list(folder_of(tmp_path).glob('train-*.bin'))) > 2


@pytest.mark.slow
def test_data_prepared_when_only_parquet_was_read_are_continued(hub, run_prepare, tmp_path):
    first = run_prepare('openwebtext_10k', part_bytes=5000)
    record = folder_of(tmp_path) / 'source.json'
    source = json.loads(record.read_text())
    record.write_text(json.dumps({key: value for key, value in source.items() if key not in ('format', 'options')}))
    (folder_of(tmp_path) / 'manifest.json').unlink()
    (folder_of(tmp_path) / 'train-00001.bin').unlink()
    again = run_prepare('openwebtext_10k', part_bytes=5000)
    assert again == first | {'lines': again['lines'], 'waited': again['waited']}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['openwebtext_10k', 'wikitext_103'])
def test_a_suite_dataset_trains_end_to_end(environment, tmp_path, name):
    changes = {
        'data.tokenizer': 'bpe',
        'data.vocab_size': 300,
        'data.cache_dir': tmp_path / 'data',
        'model.block_size': 16,
        'model.n_layer': 2,
        'model.n_head': 2,
        'model.d_model': 32,
        'model.scan_layers': False,
        'schedule.warmup_steps': 1,
        'train.steps': 3,
        'train.batch_size': 8,
        'train.accumulation_steps': 1,
        'train.log_every_steps': 1,
        'eval.batch_size': 8,
        'precision.compute': 'f32',
        'preview.max_new_tokens': 4,
    }
    command = [sys.executable, '-m', 'gpt_jax.main', f'--config=configs/{name}.py', f'--workdir={tmp_path / "run"}']
    command += [f'--config.{key}={value}' for key, value in changes.items()]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'done: 3 steps' in result.stdout
    rows = [json.loads(row) for row in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows if 'loss' in row] == [1, 2, 3]
    assert os.path.isfile(tmp_path / 'run' / 'loss.png')
