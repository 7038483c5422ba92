"""A Hugging Face hub of a few files on the loopback interface, for the real client to talk to.

It answers what `huggingface_hub` and `datasets` ask for when they read a dataset: its description, its tree, and its
files by HEAD and GET, also in ranges. Each test says what goes wrong with them.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


@dataclasses.dataclass
class Dataset:
    """A dataset: revision -> path -> content; every revision's commit is the sha1 of what is in it."""

    revisions: dict[str, dict[str, bytes]]
    card: dict = dataclasses.field(default_factory=dict)

    def commit(self, revision):
        digest = hashlib.sha1()
        for path, content in sorted(self.revisions[revision].items()):
            digest.update(path.encode() + b'\0' + content)
        return digest.hexdigest()

    def find(self, revision):
        """(commit, files) of a branch or commit; None where there is none."""
        for name in self.revisions:
            if revision in (name, self.commit(name)):
                return self.commit(name), self.revisions[name]
        return None


class LocalHub:
    """The server.

    Attributes:
      url: for HF_ENDPOINT.
      datasets: name -> Dataset.
      requests: (method, path, range) of all that was asked.
      breaks: how many of the next downloads break off after half of what they promise.
    """

    def __init__(self, datasets):
        self.datasets = datasets
        self.requests = []
        self.breaks = 0
        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()

    def stop(self):
        """Goes down: from now on nobody answers at its address."""
        self._server.shutdown()
        self._server.server_close()

    def downloads(self):
        """The GETs of files: (path, range)."""
        return [(path, range_) for method, path, range_ in self.requests if method == 'GET' and '/resolve/' in path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # or the second piece of an answer waits for the first one's receipt

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self._answer(body)

    def do_GET(self):
        self._answer(b'')

    def _answer(self, body):
        hub = self.server.hub
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        hub.requests.append((self.command, path, self.headers.get('Range')))
        match = re.fullmatch(r'/(api/)?datasets/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info|resolve)/(.+))?', path)
        if match is None or match[2] not in hub.datasets:
            self._missing('RepoNotFound')
            return
        dataset, kind, rest = hub.datasets[match[2]], match[3], match[4] or 'main'
        # A branch may have slashes in its name, as refs/convert/parquet has.
        pieces = rest.split('/')
        for length in range(len(pieces), 0, -1):
            found = dataset.find('/'.join(pieces[:length]))
            if found:
                break
        else:
            self._missing('RevisionNotFound')
            return
        name = '/'.join(pieces[length:])
        if kind == 'resolve':
            self._file(*found, name)
        elif kind == 'tree':
            recursive = urllib.parse.parse_qs(url.query).get('recursive', ['false'])[0].lower() in ('1', 'true')
            self._json(_tree(found[1], name, recursive))
        elif kind == 'paths-info':
            paths = _paths(self.headers.get('Content-Type', ''), body)
            self._json([_entry(path, found[1][path]) for path in paths if path in found[1]])
        else:
            self._json(_description(match[2], dataset, *found))

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def _missing(self, code):
        self._send(404, b'{"error": "not found"}', {'X-Error-Code': code, 'X-Error-Message': 'not found'})

    def _file(self, commit, files, name):
        if name not in files:
            self._missing('EntryNotFound')
            return
        content = files[name]
        headers = {
            'ETag': f'"{hashlib.sha256(content).hexdigest()}"',
            'X-Repo-Commit': commit,
            'Accept-Ranges': 'bytes',
        }
        range_ = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if range_ is None:
            self._send(200, content, headers, breakable=True)
            return
        first, last = int(range_[1]), min(int(range_[2] or len(content) - 1), len(content) - 1)
        headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
        self._send(206, content[first : last + 1], headers, breakable=True)

    def _send(self, status, content, headers, breakable=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if breakable and self.server.hub.breaks:
            self.server.hub.breaks -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)


def _tree(files, folder, recursive):
    """What stands in a folder: its files and folders, or all that is below it."""
    prefix = f'{folder}/' if folder else ''
    inside = [path for path in files if path.startswith(prefix)]
    if recursive:
        return [_entry(path, files[path]) for path in inside]
    names = sorted({prefix + path.removeprefix(prefix).split('/')[0] for path in inside})
    directory = {'type': 'directory', 'size': 0, 'oid': '0'}
    return [_entry(name, files[name]) if name in files else directory | {'path': name} for name in names]


def _entry(path, content):
    # Large files of the hub have the sha256 of their content beside git's object id.
    sha256 = hashlib.sha256(content).hexdigest()
    return {
        'type': 'file',
        'path': path,
        'size': len(content),
        'oid': hashlib.sha1(content).hexdigest(),
        'lfs': {'oid': sha256, 'size': len(content), 'pointerSize': 134},
    }


def _description(name, dataset, commit, files):
    siblings = [{'rfilename': path, 'size': len(content), 'blobId': 'x'} for path, content in files.items()]
    description = {'_id': '0', 'id': name, 'sha': commit, 'private': False, 'gated': False, 'disabled': False}
    return description | {'tags': [], 'downloads': 0, 'likes': 0, 'siblings': siblings, 'cardData': dataset.card}


def _paths(content_type, body):
    if 'json' in content_type:
        return json.loads(body)['paths']
    return urllib.parse.parse_qs(body.decode())['paths']
