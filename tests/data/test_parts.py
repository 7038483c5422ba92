import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from gpt_jax import files
from gpt_jax.data import DataConfig, corpus, parts, prepare, shards
from gpt_jax.data.tokenizer import train_char
from gpt_jax.errors import InputError

# Runs prepare in a process of its own, in parts of two kilobytes; STOP may kill or delay it.
RUN = """
import os, signal, sys, time
from gpt_jax.data import DataConfig, corpus, parts, prepare
corpus.PART_BYTES = 2000
{stop}
if __name__ == '__main__':
    prepare(DataConfig('text', sys.argv[1], documents='block', vocab_size=300, cache_dir=sys.argv[2], num_workers={n}))
"""
KILL = """
real = parts._write_part
def write(job, *args):
    if job.number == 3: os.kill(os.getpid(), signal.SIGKILL)
    real(job, *args)
parts._write_part = write
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Some two hundred documents in one file, in parts of two kilobytes."""
    monkeypatch.setattr(corpus, 'PART_BYTES', 2000)
    path = tmp_path / 'text.txt'
    path.write_text('\n\n'.join(f'Document {n} is about {"é" * (n % 50)}.' for n in range(300)), encoding='utf-8')
    return DataConfig('text', str(path), documents='block', vocab_size=300, cache_dir=str(tmp_path / 'cache'))


def prepare_one(*args, **keys):
    """What `prepare` makes of a single corpus."""
    (prepared,) = prepare(*args, **keys).prepared.values()
    return prepared


def quiet(line):
    assert '\n' not in line


def run(config, stop='', n=1):
    program = pathlib.Path(config.cache_dir).parent / 'program.py'
    program.write_text(RUN.format(stop=stop, n=n))
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, str(program), config.path, config.cache_dir],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def only_folder(config):
    (folder,) = pathlib.Path(config.cache_dir).iterdir()
    return folder


def content(prepared):
    return prepared.tokenizer.decode(prepared.train[:]), prepared.tokenizer.decode(prepared.validation[:])


@pytest.fixture
def whole(config, tmp_path, monkeypatch):
    """The same text prepared in a single part elsewhere: what every division must come to."""
    monkeypatch.setattr(corpus, 'PART_BYTES', 2**26)
    prepared = prepare_one(dataclasses.replace(config, cache_dir=str(tmp_path / 'elsewhere')), log=quiet)
    monkeypatch.setattr(corpus, 'PART_BYTES', 2000)
    assert len(prepared.train.shards) == 1
    return prepared


def test_parts_come_to_the_tokens_of_the_whole(config, whole):
    prepared = prepare_one(config, log=quiet)
    assert len(prepared.train.shards) > 5
    assert content(prepared) == content(whole)
    assert prepared.fingerprint == whole.fingerprint
    assert (prepared.train_bytes, prepared.validation_bytes) == (whole.train_bytes, whole.validation_bytes)
    told = json.loads((prepared.folder / 'manifest.json').read_text())
    assert told['documents'] == {'train': prepared.train.documents, 'validation': prepared.validation.documents}
    assert sum(told['documents'].values()) == 300


@pytest.mark.slow
def test_worker_processes_come_to_the_same(config, whole):
    process = run(config, n=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    prepared = prepare_one(config, log=quiet)
    assert content(prepared) == content(whole)


@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 2])
def test_after_a_kill_the_finished_parts_are_kept_and_the_rest_is_made(config, whole, n):
    process = run(config, KILL, n)
    output, _ = process.communicate(timeout=120)
    if n == 1:
        assert process.returncode == -signal.SIGKILL
    else:
        assert output.endswith('or with fewer workers\n')  # the killed one is a worker, and that is said
    folder = only_folder(config)
    assert not (folder / 'manifest.json').exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (folder / 'parts').glob('*.json')}
    assert '00000.json' in kept
    assert '00003.json' not in kept
    lines = []
    prepared = prepare_one(config, log=lines.append)
    assert lines[1].startswith(f'data: going on in {folder}, ')
    assert {name: (folder / 'parts' / name).stat().st_mtime_ns for name in kept} == kept
    assert content(prepared) == content(whole)
    assert not list(folder.glob('.*.tmp'))


@pytest.mark.slow
def test_processes_that_prepare_at_once_share_the_parts(config, whole):
    log = 'made = parts._write_part\n'
    log += 'parts._write_part = lambda job, *args: (print("part", job.number), time.sleep(0.05), made(job, *args))\n'
    processes = [run(config, log) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    made = [line for output in outputs for line in output.splitlines() if line.startswith('part ')]
    prepared = prepare_one(config, log=quiet)
    assert len(made) == len(set(made)) == len(list((prepared.folder / 'parts').glob('*.json')))
    assert content(prepared) == content(whole)


def test_pieces_on_machines_of_their_own_are_put_together_by_copying(config, whole, tmp_path):
    machines = [dataclasses.replace(config, cache_dir=str(tmp_path / name)) for name in 'abc']
    for number, machine in enumerate(machines, start=1):
        assert prepare(machine, log=quiet, piece=(number, 3)) is None
    for machine in machines[1:]:
        shutil.copytree(machine.cache_dir, machines[0].cache_dir, copy_function=shutil.copy, dirs_exist_ok=True)
    lines = []
    prepared = prepare_one(machines[0], log=lines.append, piece=(1, 3))
    assert content(prepared) == content(whole)
    assert any(line.startswith('data: verifying') for line in lines)  # copied files


def test_the_last_piece_in_a_common_folder_completes_it(config, whole):
    lines = []
    assert prepare(config, log=lines.append, piece=(2, 2)) is None
    assert lines[-1].startswith('data: piece 2/2 is done; ')
    prepared = prepare_one(config, log=quiet, piece=(1, 2))
    assert content(prepared) == content(whole)


def test_a_deleted_shard_alone_is_made_again(config, whole):
    folder = prepare_one(config, log=quiet).folder
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob('*.bin')}
    (folder / 'train-00002.bin').unlink()
    assert content(prepare_one(config, log=quiet)) == content(whole)
    changed = {name for name, time in times.items() if (folder / name).stat().st_mtime_ns != time}
    assert 'train-00002.bin' in changed <= {'train-00002.bin', 'validation-00002.bin'}


@pytest.mark.parametrize('place', [130, -1])
def test_a_flipped_bit_is_found_at_the_next_start(config, place):
    path = prepare_one(config, log=quiet).folder / 'train-00001.bin'
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r'train-00001\.bin: damaged, the sha256 .*; delete it'):
        prepare_one(config, log=quiet)


def test_unchanged_shards_are_verified_once_after_they_were_copied(config, tmp_path, monkeypatch):
    folder = prepare_one(config, log=quiet).folder
    verified = []
    monkeypatch.setattr(shards, 'verify_shard', lambda info: verified.append(info.path.name))
    prepare_one(config, log=quiet)
    assert verified == []
    os.utime(folder / 'train-00001.bin')
    prepare_one(config, log=quiet)
    prepare_one(config, log=quiet)
    assert verified == ['train-00001.bin']


def test_a_shard_of_another_tokenizer_is_refused(config):
    folder = prepare_one(config, log=quiet).folder
    other = prepare_one(dataclasses.replace(config, vocab_size=290), log=quiet).folder
    shutil.copy(other / 'train-00001.bin', folder)
    with pytest.raises(InputError, match=r'train-00001\.bin: made with another tokenizer'):
        prepare_one(config, log=quiet)


def test_a_shard_in_the_place_of_another_is_refused(config):
    folder = prepare_one(config, log=quiet).folder
    shutil.copy(folder / 'train-00000.bin', folder / 'train-00001.bin')
    with pytest.raises(InputError, match=r'train-00001\.bin: not the shard that manifest\.json names'):
        prepare_one(config, log=quiet)


def test_a_full_disk_is_one_line_and_what_was_written_stays(config, whole, monkeypatch):
    written = []

    def sync(descriptor, real=os.fsync):
        written.append(descriptor)
        if len(written) == 8:
            raise OSError(errno.ENOSPC, 'No space left on device')
        real(descriptor)

    monkeypatch.setattr(files.os, 'fsync', sync)
    with pytest.raises(InputError) as caught:
        prepare_one(config, log=quiet)
    assert 'data.cache_dir=' in str(caught.value)
    assert 'the disk is full' in str(caught.value)
    folder = only_folder(config)
    assert not list(folder.glob('.*'))
    assert list((folder / 'parts').glob('*.json'))
    monkeypatch.undo()
    monkeypatch.setattr(corpus, 'PART_BYTES', 2000)
    assert content(prepare_one(config, log=quiet)) == content(whole)


def test_a_failing_part_ends_the_preparation_with_its_line(config, monkeypatch):
    monkeypatch.setattr(parts, 'token_chunks', lambda *args: (_ for _ in ()).throw(InputError('this one line')))
    with pytest.raises(InputError, match=r'^this one line$'):
        prepare_one(config, log=quiet)
    assert not (only_folder(config) / 'manifest.json').exists()


def test_a_part_that_is_told_to_stop_leaves_nothing_half(config):
    prepared = prepare_one(config, log=quiet)
    job = parts.Job(prepared.folder, None, 7, corpus.Part())
    with pytest.raises(parts.StoppedError):
        parts._write_shards(job, prepared.tokenizer, [corpus.Passage('train', 'text')], lambda: True)
    assert not list(prepared.folder.glob('.*'))


@pytest.mark.parametrize(('n', 'sizes', 'expected'), [(8, [10], 1), (8, [2**26] * 5, 5), (2, [2**26] * 5, 2)])
def test_workers_are_as_many_as_have_work(monkeypatch, n, sizes, expected):
    monkeypatch.setattr(parts.os, 'sched_getaffinity', lambda pid: set(range(n)))
    jobs = [parts.Job(pathlib.Path(), None, number, corpus.Part(size=size)) for number, size in enumerate(sizes)]
    assert parts.worthwhile(jobs) == expected


@pytest.mark.slow
def test_a_part_that_fails_in_a_worker_ends_the_preparation_with_its_line(config, tmp_path):
    path = tmp_path / 'broken.jsonl'
    path.write_text(''.join(f'{{"text": "Document {n}"}}\n' for n in range(300)) + 'no JSON\n')
    config = dataclasses.replace(config, path=str(path), num_workers=2)
    tokenizer = train_char(['a'])  # one that is learned would come to the line before the workers do
    with pytest.raises(InputError, match=r'broken\.jsonl, line \d+ after byte \d+: not JSON'):
        prepare_one(config, tokenizer, log=quiet)
    (folder,) = pathlib.Path(config.cache_dir).iterdir()
    assert not (folder / 'manifest.json').exists()
