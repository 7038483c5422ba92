"""Prepared data on object storage: made on this machine, kept there, read through a local copy.

`data.cache_dir=gs://bucket/data` holds what a local folder would: shards, reports of parts, tokenizer, manifest. A copy
of it in the user's cache folder is what tokens are memory-mapped from; it can be removed at any time. Each shard is
fetched once and held against its sha256.

Several machines that prepare the same data share the work by the reports that they find there. Where two are at one
part both upload the same bytes. What must be one for all (the revision of a corpus, a tokenizer that is learned) is
that of the first to upload it. The manifest comes last, so that data count when all of them are there.
"""

import concurrent.futures
import os
import pathlib
import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gpt_jax.config import DataConfig
from gpt_jax.data.corpus import SPLITS, Corpus
from gpt_jax.data.parts import PARTS, Job, read_report, report_path
from gpt_jax.data.shards import (
    MANIFEST,
    TOKENIZER,
    check_shard,
    read_header,
    read_json,
    read_manifest,
    remember,
    shard_path,
    verify_shard,
)
from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import InputError
from gpt_jax.files import as_path, is_address

if TYPE_CHECKING:
    from gpt_jax.storage import Address

THREADS = 8


class SharedFolder:
    """A folder of prepared data, and the same one on object storage, where there is one: else all this does nothing.

    Attributes:
      folder: the local one.
      address: the other one, or None.
    """

    def __init__(self, folder: pathlib.Path, cache: 'Address | None'):
        self.folder = folder
        self.address = None if cache is None else cache / folder.name

    @property
    def name(self) -> str:
        """Where the data are, for messages."""
        return os.fspath(self.address or self.folder)

    def fetch(self, *names: str) -> None:
        """Has the local files be what is there under these names; what is not there stays as it is."""
        if self.address is None:
            return
        from gpt_jax import storage

        for name in names:
            if (self.address / name).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                storage.fetch(self.address / name, self.folder / name)

    def publish_first(self, name: str) -> bool:
        """Uploads a local file unless another one is there, which then takes its place here; whether it is ours."""
        if self.address is None:
            return True
        from gpt_jax import storage

        if storage.put_if(self.address / name, (self.folder / name).read_bytes(), None):
            return True
        self.fetch(name)
        return False

    def publish_part(self, number: int) -> None:
        """Uploads the shards of a finished part, and its report when they are there."""
        if self.address is None:
            return
        from gpt_jax import storage

        report = report_path(self.folder, number)
        for split in read_json(report)['splits']:
            path = shard_path(self.folder, split, number)
            storage.upload(path, self.address / path.name)
        storage.upload(report, self.address / PARTS / report.name)

    def publish_manifest(self) -> None:
        """Completes the folder there."""
        if self.address is not None:
            from gpt_jax import storage

            storage.upload(self.folder / MANIFEST, self.address / MANIFEST)

    def reports(self, corpus: Corpus, tokenizer: Tokenizer) -> dict[int, dict[str, Any]]:
        """The reports of parts that are finished there, by number, and of this corpus and tokenizer."""
        if self.address is None:
            return {}
        from gpt_jax import storage

        found, there = {}, storage.listing(self.address)
        for name in there:
            number = pathlib.PurePosixPath(name).stem
            if not name.startswith(f'{PARTS}/') or not name.endswith('.json') or not number.isdigit():
                continue
            try:
                report = read_json(self.address / name)
            except storage.StorageError:
                raise
            except InputError:
                continue
            made_of = report.get('corpus_fingerprint'), report.get('tokenizer_fingerprint')
            splits = report.get('splits')
            shards = [shard_path(self.folder, split, int(number)).name for split in splits or ()]
            if made_of == (corpus.fingerprint, tokenizer.fingerprint) and all(shard in there for shard in shards):
                found[int(number)] = report
        return found

    def share(
        self,
        jobs: Iterable[Job],
        tokenizer: Tokenizer,
        corpus: Corpus,
        build: Callable[[list[Job]], None],
        at_once: int,
    ) -> dict[int, dict[str, Any]]:
        """Makes those of the parts that no other machine makes meanwhile; returns the reports that are there then.

        They are made a few at a time, from a place in their order that differs between machines, and those that others
        have finished are left out.
        """
        jobs = list(jobs)
        if jobs:
            start = random.SystemRandom().randrange(len(jobs))
            jobs = jobs[start:] + jobs[:start]
        while True:
            there = self.reports(corpus, tokenizer)
            for job in jobs:  # finished here before, and perhaps not uploaded
                if job.number not in there and read_report(self.folder, job.number, corpus, tokenizer) is not None:
                    self.publish_part(job.number)
                    there[job.number] = read_report(self.folder, job.number, corpus, tokenizer)
            jobs = [job for job in jobs if job.number not in there]
            if not jobs:
                return there
            build(jobs[:at_once])

    def pull(self, log: Callable[[str], None]) -> None:
        """Makes the local folder complete, where the other one is.

        Raises:
          InputError: a shard there is damaged, or the store cannot be reached.
        """
        if self.address is None:
            return
        from gpt_jax import storage

        if not (self.address / MANIFEST).is_file():
            (self.folder / MANIFEST).unlink(missing_ok=True)  # removed there: to be made anew, of what is here
            return
        self.fetch(MANIFEST, TOKENIZER)
        try:
            content = read_manifest(self.folder)
        except InputError:
            (self.folder / MANIFEST).unlink()
            raise InputError(f'{self.address / MANIFEST}: damaged; remove {self.address} to prepare it anew') from None
        entries = [entry for split in SPLITS for entry in content['shards'][split]]
        missing = [entry for entry in entries if not self._has(entry)]
        if not missing:
            return
        there = storage.listing(self.address)
        size = sum(there.get(entry['file'], {}).get('size', 0) for entry in missing)
        log(f'data: fetching {len(missing)} of {len(entries)} shards, {size / 1e6:.1f} MB, from {self.address}')
        with concurrent.futures.ThreadPoolExecutor(THREADS) as executor:
            fetched = dict(zip((e['file'] for e in missing), executor.map(self._fetch_shard, missing), strict=True))
        remember(self.folder, fetched)

    def _has(self, entry: dict[str, Any]) -> bool:
        try:
            check_shard(read_header(self.folder / entry['file']), entry)
        except InputError:
            return False
        return True

    def _fetch_shard(self, entry: dict[str, Any]) -> int:
        """Returns the time of change of the local file, which marks it as verified."""
        from gpt_jax import storage

        path = self.folder / entry['file']
        try:
            storage.fetch(self.address / entry['file'], path)
            info = read_header(path)
            check_shard(info, entry)
            verify_shard(info)
        except FileNotFoundError:
            problem = 'is missing'
        except storage.StorageError:
            raise
        except InputError:
            path.unlink(missing_ok=True)
            problem = 'is damaged'
        else:
            return os.stat(path).st_mtime_ns
        raise InputError(f'{self.address / entry["file"]} {problem}; remove {self.address} to prepare it anew')


def local_folder(folder: str, called: str, log: Callable[[str], None]) -> pathlib.Path:
    """The folder of prepared data itself or, where it is on object storage, its local copy, fetched.

    Raises InputError, with what messages call it, where the store cannot be reached or it is not complete.
    """
    if not is_address(folder):
        return pathlib.Path(folder)
    from gpt_jax import storage

    address = as_path(folder, called)
    storage.check_reachable(address, called)
    config = DataConfig(cache_dir=os.fspath(address.parent))
    shared = SharedFolder(config.cache / address.name, config.shared_cache)
    shared.pull(log)
    if not (shared.folder / MANIFEST).is_file():
        raise InputError(f'{called}: no finished data there, {MANIFEST} is missing; prepare it')
    return shared.folder
