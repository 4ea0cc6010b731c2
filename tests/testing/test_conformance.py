"""Our server and a real one are the same S3 to their clients."""

from __future__ import annotations

import os

import pytest

from concurrent_dataloader.testing import ObjectServer
from tests.testing.s3_conformance import S3Conformance
from tests.testing.s3_raw import Endpoint, endpoint_of

PREFIX = "CONCURRENT_DATALOADER_TEST_S3_"


class TestObjectServer(S3Conformance):
    @pytest.fixture
    def endpoint(self, object_server: ObjectServer) -> Endpoint:
        return endpoint_of(object_server)


@pytest.mark.network
@pytest.mark.skipif(
    f"{PREFIX}ENDPOINT" not in os.environ,
    reason=f"no other S3 server: set {PREFIX}ENDPOINT, {PREFIX}ACCESS_KEY and {PREFIX}SECRET_KEY",
)
class TestRealServer(S3Conformance):
    @pytest.fixture
    def endpoint(self) -> Endpoint:
        return Endpoint(
            os.environ[f"{PREFIX}ENDPOINT"],
            os.environ[f"{PREFIX}ACCESS_KEY"],
            os.environ[f"{PREFIX}SECRET_KEY"],
            os.environ.get(f"{PREFIX}REGION", "us-east-1"),
        )
