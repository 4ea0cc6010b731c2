"""The standard AWS chain: who looks when, and what workers are given."""

from __future__ import annotations

import http.server
import itertools
import json
import multiprocessing
import pickle
import random
import threading
import weakref
from collections.abc import Generator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from botocore.credentials import RefreshableCredentials
from typing_extensions import override

from concurrent_dataloader import DataLoader
from concurrent_dataloader.datasets import StagedDataset
from concurrent_dataloader.errors import CredentialsError, ExpiredCredentialsError
from concurrent_dataloader.stores import (
    Credentials,
    CredentialsChain,
    credentials_chain,
    open_store,
)
from concurrent_dataloader.stores.credentials_chain import (
    Lasting,
    _Found,
    _Latest,
    prepare_for_workers,
)
from concurrent_dataloader.testing import ObjectServer

KEYS = [f"key{position}" for position in range(12)]


class MetadataService(http.server.ThreadingHTTPServer):
    """What answers on an instance of EC2 (IMDSv2), with credentials of the object server."""

    def __init__(self, server: ObjectServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.access_key, self.secret_key = server.access_key, server.secret_key
        self.num_asked = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        self._answer(b"token")

    def do_GET(self) -> None:
        if self.path.endswith("/security-credentials/"):
            return self._answer(b"role")
        service = cast(MetadataService, self.server)
        service.num_asked += 1
        now = datetime.now(UTC)
        answer = {
            "Code": "Success",
            "LastUpdated": now.isoformat(),
            "Type": "AWS-HMAC",
            "AccessKeyId": service.access_key,
            "SecretAccessKey": service.secret_key,
            "Token": "token",
            "Expiration": (now + timedelta(hours=6)).isoformat(),
        }
        return self._answer(json.dumps(answer).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture(autouse=True)
def _no_chains_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    living = weakref.WeakValueDictionary[int, CredentialsChain]()
    monkeypatch.setattr(credentials_chain, "_living", living)


@pytest.fixture(scope="module")
def token_server() -> Generator[ObjectServer]:
    with ObjectServer(session_token="token") as server:
        server.put_objects("bucket", {key: b"%d" % i for i, key in enumerate(KEYS)})
        yield server


@pytest.fixture
def metadata_service(
    token_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> Generator[MetadataService]:
    with MetadataService(token_server) as service:
        thread = threading.Thread(target=service.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv(
            "AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{service.server_port}"
        )
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
        yield service
        service.shutdown()
        thread.join()


class Objects(StagedDataset[Any, int]):
    """The bytes of some objects, as numbers."""

    def __init__(self, endpoint_url: str) -> None:
        self.store = open_store("s3://bucket", endpoint_url=endpoint_url)

    def __len__(self) -> int:
        return len(KEYS)

    @override
    def fetch(self, position: int) -> Any:
        return self.store.get(KEYS[position])

    @override
    def decode(self, position: int, raw: Any) -> int:
        return int(bytes(raw))

    @override
    def apply_transform(self, decoded: int) -> int:
        return decoded


@pytest.mark.parametrize(
    ("method", "parent_asks", "num_epochs"),
    [("fork", True, 2), ("fork", False, 2), ("spawn", True, 1), ("forkserver", False, 1)],
)
def test_workers_are_given_what_their_parent_found(
    method: str,
    parent_asks: bool,
    num_epochs: int,
    token_server: ObjectServer,
    metadata_service: MetadataService,
) -> None:  # N14
    data = Objects(token_server.endpoint_url)
    if parent_asks:
        assert data[3] == 3
    context = multiprocessing.get_context(method)

    for _ in range(num_epochs):  # of new workers each
        loader = DataLoader(data, 2, num_workers=2, multiprocessing_context=context)
        assert [int(label) for batch in loader for label in batch] == list(range(len(KEYS)))

    assert metadata_service.num_asked == 1


def test_what_was_found_does_not_pickle_but_while_a_worker_is_spawned(
    metadata_service: MetadataService,
) -> None:
    chain = CredentialsChain()
    assert chain.resolve().secret_access_key == metadata_service.secret_key

    pickled = pickle.dumps(chain)

    assert pickle.loads(pickled) == chain
    shown = repr(pickled) + repr(chain) + repr(vars(chain)) + repr(chain._latest.known)
    assert metadata_service.secret_key not in shown


def test_a_chain_that_finds_nothing_is_looked_through_once_before_workers_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = CredentialsChain()
    prepare_for_workers()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    prepare_for_workers()  # of another process's start: does not look again
    assert chain._found._slot.opened is None

    assert chain.resolve() == Credentials("key", "secret"), "but a request does"
    assert chain._latest.known is None, "workers find these as well"


class Clockwork:
    """Hands out credentials that last six hours, by a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.num_asked = 0
        self.num_refused = 0

    def answer(self) -> dict[str, str]:
        self.num_asked += 1
        return {
            "access_key": f"key{self.num_asked}",
            "secret_key": "secret",
            "token": "token",
            "expiry_time": (self.now + timedelta(hours=6)).isoformat(),
        }

    def refuse(self) -> dict[str, str]:
        self.num_refused += 1
        raise RuntimeError("the service is away")

    def find(self, rng: random.Random, known: Lasting | None = None) -> _Found:
        return _Found(self.walk, _Latest(known), lambda: rng, self.read_clock)

    def walk(self) -> RefreshableCredentials:
        provider = RefreshableCredentials.create_from_metadata(
            self.answer(), refresh_using=self.answer, method="test"
        )
        provider._time_fetcher = lambda: self.now
        return provider

    def read_clock(self) -> float:
        return self.now.timestamp()


def test_workers_do_not_ask_for_new_credentials_all_at_once() -> None:
    service, rng = Clockwork(), random.Random(0)
    workers = [service.find(rng) for _ in range(100)]
    end = service.now + timedelta(hours=6)
    before = [worker.resolve().access_key_id for worker in workers]
    asked = [service.num_asked]

    for minutes in (15, 14, 13, 12, 11, 10):
        service.now = end - timedelta(minutes=minutes)
        after = [worker.resolve().access_key_id for worker in workers]
        asked.append(service.num_asked)

    steps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert steps[0] == 0, "not too early"
    assert sum(steps) == 100, "each once, in time"
    assert max(steps) <= 35
    assert not set(before) & set(after)


def test_a_renewal_that_fails_costs_nothing_while_the_credentials_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = Clockwork()
    found = service.find(random.Random(0))
    provider = found._provider
    before, end = found.resolve(), service.now + timedelta(hours=6)
    provider._refresh_using = service.refuse

    service.now = end - timedelta(minutes=5)
    after = [found.resolve() for _ in range(100)]

    assert after == [before] * 100
    assert service.num_refused == 1, "not once a request"
    assert "not renewed (the service is away); those before are used on" in caplog.text
    service.now = end + timedelta(seconds=1)
    with pytest.raises(ExpiredCredentialsError, match=r"\(test\) have expired .* is away"):
        found.resolve()
    provider._refresh_using = service.answer
    assert found.resolve() != before


def test_a_worker_looks_for_its_own_shortly_before_what_it_was_given_ends() -> None:
    service, rng = Clockwork(), random.Random(0)
    end = service.now + timedelta(hours=6)
    known = Lasting(Credentials("given", "secret", "token"), end.timestamp(), "test")
    workers = [service.find(rng, known) for _ in range(100)]
    assert {worker.resolve().access_key_id for worker in workers} == {"given"}
    service.now = end - timedelta(minutes=15, seconds=1)
    assert {worker.resolve().access_key_id for worker in workers} == {"given"}
    assert service.num_asked == 0

    service.now = end - timedelta(minutes=12, seconds=30)
    asked_by_half = len([worker for worker in workers if worker.resolve().access_key_id != "given"])
    service.now = end - timedelta(minutes=10)

    assert all(worker.resolve().access_key_id != "given" for worker in workers)
    assert 30 < asked_by_half < 70
    assert service.num_asked == 100, "each once"


def test_what_has_ended_is_not_used_by_who_is_given_it() -> None:
    service = Clockwork()
    known = Lasting(Credentials("given", "secret"), service.now.timestamp(), "test")

    assert service.find(random.Random(0), known).resolve().access_key_id == "key1"


def test_a_worker_that_finds_nothing_uses_what_it_was_given_to_its_end() -> None:
    service = Clockwork()
    end = service.now + timedelta(hours=6)
    known = Lasting(Credentials("given", "secret"), end.timestamp(), "iam-role")

    def walk() -> Any:
        raise CredentialsError("credentials: none to be had")

    found = _Found(walk, _Latest(known), lambda: random.Random(0), service.read_clock)
    service.now = end - timedelta(seconds=1)
    assert found.resolve().access_key_id == "given"

    service.now = end
    with pytest.raises(ExpiredCredentialsError, match=r"\(iam-role\) have expired .* to be had"):
        found.resolve()
