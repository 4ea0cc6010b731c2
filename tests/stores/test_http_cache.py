"""An HTTP cache in front of the store, by endpoint: a real Varnish, where one is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarking.misc.init_benchmarking import get_dataset
from concurrent_dataloader.dataloader_mod.dataloader import DataLoader
from concurrent_dataloader.errors import AccessDeniedError, KeyNotFoundError
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores import Credentials, open_store
from concurrent_dataloader.testing import ObjectServer

VARNISHD = shutil.which("varnishd") or shutil.which("varnishd", path="/usr/sbin:/usr/local/sbin")

OBJECTS = {f"val/{number % 2}/{number}.jpg": b"%d" % number * 300 for number in range(30)}

# Caches whole objects, whoever asks: a hit is not checked for its signature. What Varnish would
# change on its way (a range, a condition, HEAD) is passed on as it was signed.
VCL = """
vcl 4.1;
backend store {{ .host = "127.0.0.1"; .port = "{port}"; }}
sub vcl_recv {{
    if (req.method != "GET" && req.method != "HEAD") {{ return (pass); }}
    if (req.url !~ "^/[^/?]+/[^?]+$") {{ return (pass); }}
    return (hash);
}}
sub vcl_hash {{ hash_data(req.url); return (lookup); }}
sub vcl_miss {{ if (req.method != "GET" || req.http.Range) {{ return (pass); }} }}
sub vcl_backend_response {{
    if (bereq.uncacheable || beresp.status != 200) {{
        set beresp.uncacheable = true;
        set beresp.ttl = 1s;
    }} else {{
        set beresp.ttl = 1h;
    }}
    return (deliver);
}}
"""


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def varnish(object_server: ObjectServer, tmp_path: Path) -> Iterator[str]:
    """Give the address of a Varnish in front of the object server."""
    if VARNISHD is None:
        pytest.skip("varnishd is not installed: apt-get install varnish")
    port = find_free_port()
    (tmp_path / "store.vcl").write_text(VCL.format(port=object_server.port))
    command = [VARNISHD, "-F", "-j", "none", "-n", str(tmp_path / "varnish")]
    command += ["-f", str(tmp_path / "store.vcl"), "-a", f"127.0.0.1:{port}", "-T", "none"]
    command += ["-s", "malloc,64M", "-p", "http_gzip_support=off", "-p", "workspace_client=96k"]
    log = tmp_path / "varnish.log"
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait_for(port, process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            threading.Event().wait(0.05)
        else:
            return


@pytest.mark.slow
def test_the_second_epoch_is_served_by_the_cache(
    object_server: ObjectServer, varnish: str, tmp_path: Path
) -> None:
    object_server.put_objects("imagenet", OBJECTS)
    keys = {"access_key": object_server.access_key, "secret": object_server.secret_key}
    (tmp_path / "credentials.json").write_text(json.dumps(keys))
    (tmp_path / "index.json").write_text(json.dumps(list(OBJECTS)))
    dataset = get_dataset(
        "s3",
        "val",
        use_cache=True,
        index_file=tmp_path / "index.json",
        s3_credential_file=tmp_path / "credentials.json",
        endpoint_url=object_server.endpoint_url,
        cache_endpoint_url=varnish,
        decode=None,
    )

    for num_requests in (len(OBJECTS), 0):
        object_server.reset_counters()
        loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2, collate_fn=list)
        raw = [bytes(raw) for batch in loader for raw, _ in batch]
        assert sorted(raw) == sorted(OBJECTS.values())
        assert object_server.counters().num_requests == num_requests


def test_ranges_errors_and_wrong_keys_pass_through_the_cache(
    object_server: ObjectServer, varnish: str
) -> None:
    object_server.put_objects("imagenet", OBJECTS)
    credentials = Credentials(object_server.access_key, object_server.secret_key)
    store = open_store("s3://imagenet", endpoint_url=varnish, credentials=credentials)
    key, body = next(iter(OBJECTS.items()))

    assert bytes(store.get(key, ByteRange(3, 7))) == body[3:7]
    assert bytes(store.get(key)) == body
    assert bytes(store.get(key, ByteRange(3, 7))) == body[3:7]
    with pytest.raises(KeyNotFoundError):
        store.get("missing")
    wrong = Credentials(object_server.access_key, "wrong")
    with pytest.raises(AccessDeniedError):
        open_store("s3://imagenet", endpoint_url=varnish, credentials=wrong).get("val/1/1.jpg")
