"""TLS in front of a server that has none, and certificates for it."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Generator

_CHUNK_BYTES = 65536


def make_certificates(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Make an authority and a certificate of localhost by it, with the ``openssl`` command.

    Returns:
        The authority's certificate, and one file with the server's certificate and key.
    """
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    commands = [
        f"{new} -subj /CN=authority -keyout a.key -out authority.pem",
        f"{new} -subj /CN=localhost -keyout s.key -out s.pem -CA authority.pem -CAkey a.key"
        " -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE",
    ]
    for command in commands:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    server = folder / "server.pem"
    server.write_text((folder / "s.pem").read_text() + (folder / "s.key").read_text())
    return folder / "authority.pem", server


class _Forwarder(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        # The handshake belongs to this thread: a client that breaks it off must not stop others.
        with (
            contextlib.suppress(OSError),
            self.server.tls.wrap_socket(self.request, server_side=True) as front,
            socket.create_connection(("127.0.0.1", self.server.target_port)) as back,
        ):
            answers = threading.Thread(target=_copy, args=(back, front), daemon=True)
            answers.start()
            _copy(front, back)
            answers.join(10)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            target.sendall(chunk)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forwarder)
        self.tls = tls
        self.target_port = target_port


@contextlib.contextmanager
def serve_tls(certificate: pathlib.Path, target_port: int) -> Generator[str]:
    """Serve a server of this machine by https; gives the URL."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with _Server(tls, target_port) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"https://localhost:{server.server_address[1]}"
        server.shutdown()
        thread.join(10)
