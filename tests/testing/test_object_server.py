"""The server's life, and what its owner can tell it."""

from __future__ import annotations

import hashlib
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import textwrap
from typing import Any

import psutil
import pytest

from concurrent_dataloader.testing import ObjectServer
from concurrent_dataloader.testing.__main__ import main
from tests.testing.s3_raw import Endpoint, ask, ask_signed, endpoint_of

ROOT = pathlib.Path(__file__).parents[2]


def run_python(code: str, **options: Any) -> subprocess.Popen[str]:
    """Run code in an interpreter of its own that finds the library."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def wait_until_gone(pid: int) -> None:
    """Wait for the end of a process that need not be our child, and may be nobody's to bury."""
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([end], [], [], 10.0)[0], f"process {pid} is still there"
    finally:
        os.close(end)


def test_a_closed_server_is_gone(make_object_server: Any) -> None:
    server = make_object_server()
    pid, port = server.pid, server.port

    server.close()
    server.close()

    assert not psutil.pid_exists(pid)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with pytest.raises(RuntimeError, match="it does not run"):
        _ = server.endpoint_url


def test_a_server_may_be_started_again_on_its_port(make_object_server: Any) -> None:
    server = make_object_server()
    port = server.port
    server.close()

    with ObjectServer(port=port) as again:
        assert again.port == port
        assert ask(endpoint_of(again), "GET", "/").status == 403


def test_a_port_that_is_taken_is_named(make_object_server: Any) -> None:
    port = make_object_server().port

    with pytest.raises(OSError, match=f"port: got {port}, which cannot be had"):
        ObjectServer(port=port).start()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_listens_on_loopback_only(object_server: ObjectServer) -> None:
    listening = [
        connection.laddr
        for connection in psutil.Process(object_server.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]

    assert [(where.ip, where.port) for where in listening] == [("127.0.0.1", object_server.port)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(how: signal.Signals) -> None:
    owner = run_python(
        """
        from concurrent_dataloader.testing import ObjectServer

        with ObjectServer() as server:
            print(server.pid, flush=True)
            input()
        """,
        stdin=subprocess.PIPE,
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())

    owner.send_signal(how)
    owner.communicate()

    wait_until_gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere this takes a check each second")
def test_it_dies_with_its_parent_though_a_forked_child_lives_on() -> None:
    owner = run_python(
        """
        import os, signal
        from concurrent_dataloader.testing import ObjectServer

        server = ObjectServer().start()
        child = os.fork()
        if child:
            print(server.pid, child, flush=True)
        signal.pause()
        """
    )
    assert owner.stdout is not None
    server_pid, child_pid = map(int, owner.stdout.readline().split())
    try:
        owner.kill()
        owner.wait()

        wait_until_gone(server_pid)
        assert psutil.pid_exists(child_pid)
    finally:
        os.kill(child_pid, signal.SIGKILL)
        owner.communicate()


def test_a_forked_child_that_ends_leaves_it_running() -> None:
    owner = run_python(
        """
        import os
        from concurrent_dataloader.testing import ObjectServer

        with ObjectServer() as server:
            if not (pid := os.fork()):
                server.create_bucket("made-by-the-child")
                raise SystemExit
            os.waitpid(pid, 0)
            print(server.put_objects("made-by-the-child", {"a": b"x"}))
        """
    )

    assert owner.communicate()[0] == "1\n"
    assert owner.returncode == 0


def test_ctrl_c_leaves_the_server_to_its_parent() -> None:
    owner = run_python(
        """
        from concurrent_dataloader.testing import ObjectServer

        with ObjectServer() as server:
            try:
                print(server.pid, flush=True)
                input()
            except KeyboardInterrupt:
                print(server.counters().num_requests, flush=True)
        """,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())

    os.killpg(owner.pid, signal.SIGINT)
    out, _ = owner.communicate()

    assert (out, owner.returncode) == ("0\n", 0)
    wait_until_gone(pid)


def test_a_forgotten_server_is_stopped_with_a_warning() -> None:
    owner = [ObjectServer().start()]
    pid = owner[0].pid

    with pytest.warns(ResourceWarning, match="was not closed"):
        owner.clear()

    assert not psutil.pid_exists(pid)


def test_a_second_start_is_refused(make_object_server: Any) -> None:
    server = make_object_server()

    with pytest.raises(RuntimeError, match="it runs, at http"):
        server.start()


def test_its_secret_is_in_no_repr_and_in_no_command_line(make_object_server: Any) -> None:
    server = make_object_server(secret_key="hush-hush")

    assert "hush-hush" not in repr(server)
    assert "hush-hush" not in " ".join(psutil.Process(server.pid).cmdline())


def test_control_needs_its_token(object_server: ObjectServer) -> None:
    endpoint = endpoint_of(object_server)

    for answer in (
        ask(endpoint, "POST", "/-/restore", {}, b"{}\n"),
        ask(endpoint, "POST", "/-/restore", {"x-control-token": "guess"}, b"{}\n"),
        ask_signed(endpoint, "POST", "/-/restore", {}, b"{}\n"),
    ):
        assert answer.status == 403


def test_objects_are_stored_from_a_lazy_source(object_server: ObjectServer) -> None:
    num_stored = object_server.put_objects(
        "bucket", ((f"k{number}", bytes([number]) * 1_000_000) for number in range(40))
    )

    endpoint = endpoint_of(object_server)
    answer = ask_signed(endpoint, "GET", "/bucket/k39")
    assert num_stored == 40
    assert answer.body == bytes([39]) * 1_000_000
    assert answer.headers["etag"] == f'"{hashlib.md5(answer.body).hexdigest()}"'
    assert object_server.counters().num_requests == 1


def test_stored_objects_may_have_a_checksum(object_server: ObjectServer) -> None:
    object_server.put_objects("bucket", {"a": b"123456789"}, checksum="crc32c")
    endpoint = endpoint_of(object_server)

    asked = ask_signed(endpoint, "GET", "/bucket/a", {"x-amz-checksum-mode": "ENABLED"})

    assert asked.headers["x-amz-checksum-crc32c"] == "4waSgw=="
    assert "x-amz-checksum-crc32c" not in ask_signed(endpoint, "GET", "/bucket/a").headers


def test_stored_objects_may_have_the_etags_of_parts(object_server: ObjectServer) -> None:
    object_server.put_objects("bucket", {"a": b"body"}, checksum="crc32", in_parts=True)

    asked = ask_signed(
        endpoint_of(object_server), "GET", "/bucket/a", {"x-amz-checksum-mode": "ENABLED"}
    )

    md5_of_md5 = hashlib.md5(hashlib.md5(b"body").digest()).hexdigest()
    assert asked.headers["etag"] == f'"{md5_of_md5}-1"'
    assert "-" not in asked.headers["x-amz-checksum-crc32"]


def test_an_unknown_checksum_is_refused(object_server: ObjectServer) -> None:
    with pytest.raises(ValueError, match="checksum: got 'crc7'"):
        object_server.put_objects("bucket", {"a": b""}, checksum="crc7")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_is_served_by_the_paths_below_it(
    object_server: ObjectServer, tmp_path: pathlib.Path, in_memory: bool
) -> None:
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "train" / "n01" / "a b.jpg").write_bytes(b"12345")
    big = os.urandom(3_000_000)
    (tmp_path / "big").write_bytes(big)

    stored = object_server.put_folder("bucket", tmp_path, prefix="set/", in_memory=in_memory)

    endpoint = endpoint_of(object_server)
    assert stored == (2, 3_000_005)
    small = ask_signed(endpoint, "GET", "/bucket/set/train/n01/a%20b.jpg")
    assert (small.status, small.body) == (200, b"12345")
    assert ask_signed(endpoint, "GET", "/bucket/set/big").body == big
    part = ask_signed(endpoint, "GET", "/bucket/set/big", {"Range": "bytes=1000000-2000000"})
    assert part.body == big[1_000_000:2_000_001]


def test_a_folder_that_is_not_there_is_named(
    object_server: ObjectServer, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(NotADirectoryError, match="none"):
        object_server.put_folder("bucket", tmp_path / "none")


def test_restore_leaves_nothing_of_what_was_set(object_server: ObjectServer) -> None:
    object_server.put_objects("bucket", {"a": b"x"})
    object_server.set_latency(30)
    object_server.set_rate_limit(0.001, burst=1)
    object_server.add_credential("other", "secret")

    object_server.restore()

    endpoint = endpoint_of(object_server)
    assert b"<Bucket>" not in ask_signed(endpoint, "GET", "/").body
    other = endpoint._replace(access_key="other", secret_key="secret")
    assert ask_signed(other, "GET", "/").code == "InvalidAccessKeyId"
    assert object_server.counters().num_requests == 2


def test_the_package_imports_neither_torch_nor_a_client() -> None:
    process = run_python(
        """
        import sys
        import concurrent_dataloader.testing.pytest_plugin
        import concurrent_dataloader.testing
        heavy = {"torch", "boto3", "botocore", "obstore", "numpy", "aiohttp"}
        print(sorted(heavy & set(sys.modules)))
        """
    )

    assert process.communicate()[0] == "[]\n"


def test_the_command_serves_a_folder_until_ctrl_c(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "concurrent_dataloader.testing"),
            *("--folder", str(tmp_path), "--bucket", "photos", "--public", "--secret-key", "a b"),
            *("--latency-median-s", "0.01", "--fault", "slow_down,key_pattern=a,first_attempts=1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(5)]
    told = dict(line.removeprefix("export ").split("=", 1) for line in lines)
    endpoint = Endpoint(told["AWS_ENDPOINT_URL"], told["AWS_ACCESS_KEY_ID"], "a b", "us-east-1")

    first = ask(endpoint, "GET", "/photos/a")
    second = ask_signed(endpoint, "GET", "/photos/a")
    process.send_signal(signal.SIGINT)
    process.communicate()

    assert told["AWS_SECRET_ACCESS_KEY"] == "'a b'"
    assert (first.status, second.status, second.body) == (503, 200, b"12345")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--folder", "/not/there"], "--folder: got '/not/there'"),
        (["--fault", "meteor"], "kind: got 'meteor'"),
        (["--fault", "slow_down,rat=1"], "got 'rat=1', expected one of first_attempts"),
        (["--latency-median-s", "-1"], "median_s: got -1.0"),
        (["--port", "70000"], "--port: got 70000"),
        (["--total-bytes-per-s", "0"], "--total-bytes-per-s: got 0.0"),
    ],
)
def test_the_command_names_what_it_cannot_use(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)

    assert end.value.code == 2
    assert named in capsys.readouterr().err
