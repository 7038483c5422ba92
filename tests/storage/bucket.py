"""A bucket on this machine: gcp-storage-emulator, with what a real one does besides.

It answers many requests at once, writes only where `ifGenerationMatch` holds, and fails where a test wants it to.
"""

import contextlib
import functools
import http.server
import json
import logging
import re
import threading
import urllib.parse

import pytest

pytest.importorskip('gcsfs')
emulator = pytest.importorskip('gcp_storage_emulator.server')
from gcp_storage_emulator.exceptions import NotFound  # noqa: E402
from gcp_storage_emulator.handlers import buckets, objects  # noqa: E402
from gcp_storage_emulator.storage import Storage  # noqa: E402

NAME = 'bucket'
logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)


class Handler(emulator.RequestHandler):
    """The emulator's, one request after another."""

    protocol_version = 'HTTP/1.1'  # a connection serves many
    # An answer is written in two pieces: the second would wait for the first one's receipt, which a client delays.
    disable_nagle_algorithm = True

    def __init__(self, bucket, *args):
        self.bucket = bucket
        super().__init__(bucket.storage, *args)

    def _answer(self, method, do):
        url = urllib.parse.urlsplit(self.path)
        with self.bucket.lock:
            status = self.bucket.fails(method, urllib.parse.unquote(self.path))
            if status is None and method == 'POST':
                status = self._precondition({k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()})
            if status is None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a reader that wants no more
                    do()
                return
        self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = json.dumps({'error': {'code': status, 'message': f'as the test wants it ({status})'}}).encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _precondition(self, query):
        expected, name = query.get('ifGenerationMatch'), query.get('name')
        if expected is None or name is None:
            return None
        try:
            there = self.storage.get_file_obj(NAME, name)['generation']
        except NotFound:
            there = '0'
        return None if there == expected else 412

    def end_headers(self):
        """With the generation of an object that is read, which a conditional write of it names."""
        object_read = re.fullmatch(r'(?:/storage/v1)?/b/[^/]+/o/([^?]+)\?(?:.*&)?alt=media(?:&.*)?', self.path)
        if self.command == 'GET' and object_read:
            with contextlib.suppress(NotFound):
                there = self.storage.get_file_obj(NAME, urllib.parse.unquote(object_read[1]))
                self.send_header('x-goog-generation', there['generation'])
        super().end_headers()

    def do_GET(self):  # noqa: N802
        self._answer('GET', super().do_GET)

    def do_POST(self):  # noqa: N802
        self._answer('POST', super().do_POST)

    def do_DELETE(self):  # noqa: N802
        self._answer('DELETE', super().do_DELETE)

    def do_PUT(self):  # noqa: N802
        self._answer('PUT', super().do_PUT)


class Server(http.server.ThreadingHTTPServer):
    """With room for all that ask at once."""

    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Nothing: a reader that wants no more, or was killed."""


class Bucket:
    """A running one.

    Attributes:
      environment: variables that lead gcsfs and tensorstore to it.
      fails: (method, path) -> the status to answer with, None: do what is asked.
    """

    def __init__(self):
        self.lock, self.fails = threading.Lock(), lambda method, path: None
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(NAME, self.storage)
        self.server = Server(('127.0.0.1', 0), functools.partial(Handler, self))
        url = f'http://127.0.0.1:{self.server.server_port}'
        self.environment = {
            'STORAGE_EMULATOR_HOST': url,
            'TENSORSTORE_GCS_HTTP_URL': url,
            'GCE_METADATA_ROOT': 'metadata.invalid',
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def names(self, beginning=''):
        """Of its objects, sorted."""
        with self.lock:
            return sorted(item['name'] for item in self.storage.get_file_list(NAME, beginning)[0])

    def read(self, name):
        """An object."""
        with self.lock:
            return bytes(self.storage.get_file(NAME, name))

    def write(self, name, data):
        """Makes or replaces an object; the caller is `fails`, or nobody else is at the bucket."""
        resource = objects._make_object_resource('', NAME, name, 'application/octet-stream', str(len(data)))
        self.storage.create_file(NAME, name, data, objects._checksums(data, resource))

    def close(self):
        """Ends the server."""
        self.server.shutdown()
        self.server.server_close()

    def clear(self):
        """Removes all objects."""
        with self.lock:
            self.storage.wipe(keep_buckets=True)
        self.fails = lambda method, path: None
