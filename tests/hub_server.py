"""A stand-in for the hub on loopback: what huggingface_hub asks when it lists a repository and fetches files over
HTTP. Xet is not among it.

Large files (safetensors) are kept as the hub keeps them, in LFS: their path redirects to another host's, which
here is another name of this one. It answers ranges, and notes all that it is asked.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Asked(NamedTuple):
    method: str
    path: str  # of the repository's file for those that come by the redirect
    range: str | None
    token: str | None
    host: str


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """`commits` are the repository's states, each with its files' content by name; "main" is the last one.

    What can be asked of it: `damaged` files come with another last byte, `short` ones without their last, `stalls`
    after so many bytes of a file, `refuses` with a status and the hub's error code, `whole` whatever range is
    asked for, `in_xet` is said of these files, `token` must be shown; `resets` is how often a file's
    connection is reset in its middle, `unwell` how often 503 is the answer for a file.
    """

    def __init__(self, name="someone/tiny"):
        self.name = name
        self.commits = {}
        self.asked = []
        self.damaged, self.short, self.in_xet = set(), set(), set()
        self.stalls, self.stalled = {}, threading.Event()
        self.resets, self.unwell = {}, {}
        self.refuses, self.whole, self.token = None, False, None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that was killed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, files):
        """A new state of the repository; files may be a folder → its commit."""
        if not isinstance(files, dict):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        commit = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit] = files
        return commit

    def fetched(self):
        """Name → ranges of the files whose bytes were asked for since the last call; None is the whole file."""
        found = {}
        for asked in self.asked:
            if asked.method == "GET" and "/api/" not in asked.path:
                found.setdefault(asked.path, []).append(asked.range)
        self.asked.clear()
        return found

    def wait_over(self):
        self.stalled.set()
        self._over.wait(60)

    def find(self, revision):
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if found := re.fullmatch(r"/lfs/(\w+)/(.+)", path):
                commit, file = found.groups()
                self._note(file)
                return self._send_file(file, hub.commits[commit][file])
            if found := re.fullmatch(rf"/{hub.name}/resolve/([^/]+)/(.+)", path):
                return self._resolve(*found.groups())
            self._note(path)
            if hub.refuses is not None:
                status, code = hub.refuses
                return self._send(status, b"{}", {"X-Error-Code": code} if code else {})
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            found = re.fullmatch(rf"/api/models/{hub.name}(?:/(revision|tree)/([^/]+))?", path)
            if found is None:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            what, revision = found[1], found[2] or "main"
            commit = hub.find(revision)
            if commit is None:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if what == "tree":
                listed = [self._entry(name, data) for name, data in hub.commits[commit].items()]
                listed.append({"type": "directory", "path": "figures", "oid": "0" * 40})
                return self._send(200, json.dumps(listed).encode())
            return self._send(200, json.dumps({"id": hub.name, "sha": commit}).encode())

        def _note(self, path):
            asked = self.headers.get("Range"), self.headers.get("Authorization"), self.headers["Host"]
            hub.asked.append(Asked(self.command, path, *asked))

        def _entry(self, name, data):
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
            if name in hub.in_xet:
                entry["xetHash"] = hashlib.sha256(data).hexdigest()
            return entry

        def _resolve(self, commit, file):
            data = hub.commits[commit].get(file)
            if data is None:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            head = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(data)}"'}
            if not file.endswith(".safetensors"):
                self._note(file)
                return self._send_file(file, data, head)
            head["X-Linked-ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            head["X-Linked-Size"] = str(len(data))
            if file in hub.in_xet:
                head["X-Xet-Hash"] = hashlib.sha256(data).hexdigest()
                head["X-Xet-Refresh-Route"] = f"/api/models/{hub.name}/xet-read-token/{commit}"
            head["Location"] = f"http://localhost:{hub.port}/lfs/{commit}/{file}"
            return self._send(302, b"", head)

        def _send_file(self, file, data, head=()):
            if file in hub.damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if file in hub.short:
                data = data[:-1]
            if self._again(hub.unwell, file):
                return self._send(503, b"{}")
            first, status, head = 0, 200, dict(head)
            asked = self.headers.get("Range")
            if asked is not None and not hub.whole:
                first, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
                head["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            if self._again(hub.resets, file):
                half = len(data) // 2
                self._send(status, data[first:half], head, len(data) - first)
                time.sleep(0.3)  # what is on its way arrives
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return self.connection.close()
            if file in hub.stalls and self.command == "GET":
                self._send(status, data[first : hub.stalls[file]], head, len(data) - first)
                return hub.wait_over()
            return self._send(status, data[first:], head)

        def _again(self, counts, file):
            left = counts.get(file, 0) if self.command == "GET" else 0
            counts[file] = left - 1
            return left > 0

        def _send(self, status, body, head=None, length=None):
            self.send_response(status)
            for name, value in (head or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
