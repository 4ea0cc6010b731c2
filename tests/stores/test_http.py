"""Plain web servers: redirects, ranges or none, statuses, TLS."""

from __future__ import annotations

import asyncio
import functools
import http.server
import pathlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from concurrent_dataloader.errors import (
    AccessDeniedError,
    BodyMismatchError,
    ByteRangeError,
    KeyNotFoundError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import RetryPolicy, Store, open_store, open_writable_store
from concurrent_dataloader.stores._http import HttpStore
from concurrent_dataloader.stores.address import ClientOptions, HttpAddress
from tests.stores.contract import OBJECTS, SizedStoreContract
from tests.stores.test_local import write_objects
from tests.stores.tls_proxy import make_certificates

QUICK = RetryPolicy(max_attempts=3, first_wait_s=0.001)


class FolderHandler(http.server.SimpleHTTPRequestHandler):
    """Python's own server of files; it knows no ranges, and sends redirects where told."""

    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self) -> None:
        if self.path.startswith("/moved/"):
            self.redirect(302, "/files/" + self.path.removeprefix("/moved/"))
        elif self.path.startswith("/relative/"):
            self.redirect(307, "../files/" + self.path.removeprefix("/relative/"))
        elif self.path.startswith("/circle/"):
            self.redirect(301, self.path)
        elif self.path.startswith("/status/"):
            self.send_response(int(self.path.rpartition("/")[2]))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/chunked/"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\n01234\r\n5\r\n56789\r\n0\r\n\r\n")
        elif self.path.startswith("/cut/"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")
            self.close_connection = True
        elif self.path.startswith("/files/") and not self.path.endswith("/"):
            super().do_GET()
        else:
            self.send_error(404)

    def redirect(self, status: int, location: str) -> None:
        self.send_response(status)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/files"))

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def send_head(self) -> Any:
        path = pathlib.Path(self.translate_path(self.path))
        if path.is_dir():
            self.send_error(404)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class RangeHandler(FolderHandler):
    """Knows ranges as well."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = pathlib.Path(self.translate_path(self.path))
        if wanted is None or not path.is_file() or not self.path.startswith("/files/"):
            super().do_GET()
            return
        body = path.read_bytes()
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        if first >= len(body):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        part = body[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(part)


class QuietServer(http.server.ThreadingHTTPServer):
    """Does not print when a client leaves."""

    daemon_threads = True
    request_queue_size = 128  # 5 by default, and what comes beyond waits for a second and more

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: pathlib.Path) -> Iterator[Serve]:
    """Give a function that serves OBJECTS and gives the server's URL."""
    write_objects(tmp_path / "served")
    servers: list[QuietServer] = []

    def start(handler: type[FolderHandler], tls: ssl.SSLContext | None = None) -> str:
        made = functools.partial(handler, directory=str(tmp_path / "served"))
        server = QuietServer(("127.0.0.1", 0), made)
        servers.append(server)
        if tls is not None:
            # The handshake belongs into the connection's own thread: a client that leaves in the
            # middle of it would keep the server from accepting, and from being shut down.
            server.socket = tls.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        scheme, host = ("https", "localhost") if tls is not None else ("http", "127.0.0.1")
        return f"{scheme}://{host}:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(params=["http", "aiohttp"])
def client(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("client", ["http", "aiohttp"])
@pytest.mark.parametrize("handler", [FolderHandler, RangeHandler])
class TestWebServer(SizedStoreContract):
    @pytest.fixture
    def store(self, serve: Serve, client: Any, handler: type[FolderHandler]) -> Iterator[Store]:
        store = open_store(f"{serve(handler)}/files/", client=client)
        yield store
        store.close()


def read(store: Store, key: str, colour: str, byte_range: ByteRange | None = None) -> bytes:
    try:
        if colour == "blocking":
            return bytes(store.get(key, byte_range))
        return bytes(asyncio.run(store.get_async(key, byte_range)))
    finally:
        store.close()


@pytest.mark.parametrize("colour", ["blocking", "awaited"])
@pytest.mark.parametrize("folder", ["moved", "relative"])
def test_redirects_are_followed(serve: Serve, client: Any, folder: str, colour: str) -> None:
    store = open_store(f"{serve(RangeHandler)}/{folder}/", client=client)

    assert read(store, "ten", colour) == b"0123456789"
    assert read(store, "ten", colour, ByteRange(2, 5)) == b"234"


def test_a_redirect_to_itself_ends(serve: Serve, client: Any) -> None:
    store = open_store(f"{serve(FolderHandler)}/circle/", client=client)

    with pytest.raises(StoreError, match="more than 5 redirects"):
        read(store, "ten", "blocking")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, StoreError),
        (401, AccessDeniedError),
        (403, AccessDeniedError),
        (404, KeyNotFoundError),
        (410, StoreError),
        (416, ByteRangeError),
        (429, ThrottledError),
        (500, StoreUnavailableError),
        (502, StoreUnavailableError),
        (503, ThrottledError),
        (504, StoreUnavailableError),
    ],
)
def test_a_status_is_the_error_that_fits(
    serve: Serve, client: Any, status: int, error: type[StoreError]
) -> None:
    store = open_store(f"{serve(FolderHandler)}/status/", client=client, retry=QUICK)

    with pytest.raises(error, match=f"status {status} from http://127") as raised:
        read(store, str(status), "blocking")

    assert type(raised.value) is error
    assert ("3 attempts" in str(raised.value)) == issubclass(error, StoreUnavailableError)


def test_a_chunked_body_is_read_whole(serve: Serve, client: Any) -> None:
    store = open_store(f"{serve(FolderHandler)}/chunked/", client=client)

    assert read(store, "x", "blocking") == b"0123456789"


def test_a_body_that_is_cut_is_an_error(serve: Serve, client: Any) -> None:
    store = open_store(f"{serve(FolderHandler)}/cut/", client=client, retry=QUICK)

    with pytest.raises(BodyMismatchError, match="3 attempts"):
        read(store, "x", "blocking")


class Elsewhere(FolderHandler):
    """Redirects to a place that must not be followed to, with a secret in its query."""

    location = "ftp://host/ten?X-Amz-Signature=s3cret"

    def do_GET(self) -> None:
        self.redirect(302, self.location)


class ToPlainHttp(Elsewhere):
    location = "http://127.0.0.1:9/ten?X-Amz-Signature=s3cret"


def test_a_redirect_to_no_web_server_is_an_error_without_its_query(
    serve: Serve, client: Any
) -> None:
    store = open_store(f"{serve(Elsewhere)}/files/", client=client)

    with pytest.raises(StoreError, match=r"ten: redirected to 'ftp://host/ten\?\.\.\.'") as raised:
        read(store, "ten", "blocking")

    assert "s3cret" not in str(raised.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificates")
# aiohttp closes TLS connections some turns of the loop after its session, as its documents say.
@pytest.mark.filterwarnings("ignore:.*unclosed transport:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_redirect_from_https_to_http_is_not_followed(
    serve: Serve, client: Any, tmp_path: pathlib.Path
) -> None:
    authority, certificate = make_certificates(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    url = f"{serve(ToPlainHttp, tls)}/files/"
    store = open_store(url, client=client, ca_file=authority, retry=QUICK)

    with pytest.raises(StoreError, match="redirected from https to http, expected https") as raised:
        read(store, "ten", "blocking")

    assert type(raised.value) is StoreError, "not that of the place it leads to"
    assert "s3cret" not in str(raised.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
# aiohttp closes TLS connections some turns of the loop after its session, as its documents say.
@pytest.mark.filterwarnings("ignore:.*unclosed transport:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_https_is_trusted_by_its_certificate_only(
    serve: Serve, client: Any, tmp_path: pathlib.Path
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext "
        f"subjectAltName=DNS:localhost -keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    url = f"{serve(FolderHandler, tls)}/files/"

    trusting = open_store(url, client=client, ca_file=certificate, retry=QUICK)
    doubting = open_store(url, client=client, retry=QUICK)

    assert read(trusting, "large", "blocking") == OBJECTS["large"]
    assert read(trusting, "large", "awaited") == OBJECTS["large"]
    with pytest.raises(StoreError, match="certificate"):
        read(doubting, "ten", "blocking")


def test_a_server_that_closes_idle_connections_costs_no_error(serve: Serve) -> None:
    class Hasty(RangeHandler):
        timeout = 0.05

    store = open_store(f"{serve(Hasty)}/files/", client="http", retry=RetryPolicy(max_attempts=1))
    for _ in range(3):
        assert bytes(store.get("ten")) == b"0123456789"
        threading.Event().wait(0.15)  # the server's patience is the thing under test
    store.close()


def test_a_read_under_way_while_the_store_is_closed_leaves_no_connection(serve: Serve) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Slow(RangeHandler):
        def do_GET(self) -> None:
            began.set()
            go_on.wait(10)
            super().do_GET()

    store = HttpStore(HttpAddress(base_url=f"{serve(Slow)}/files"), ClientOptions())
    connections = store._connections.get()
    reading = threading.Thread(target=store.get, args=("ten",))
    reading.start()
    assert began.wait(10)
    store.close()
    go_on.set()
    reading.join(10)

    assert not any(connections._idle.values())


def test_a_web_server_cannot_be_written(serve: Serve) -> None:
    with pytest.raises(ValueError, match="read only"):
        open_writable_store(f"{serve(FolderHandler)}/files/")


@pytest.mark.parametrize("name", ["boto3", "aiobotocore"])
def test_a_client_of_buckets_does_not_go_with_a_web_server(name: Any) -> None:
    with pytest.raises(ValueError, match="expected 'http' or 'aiohttp'"):
        open_store("http://127.0.0.1/", client=name)
