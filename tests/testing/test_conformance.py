"""Our server and a real one are the same S3 to their clients."""

from __future__ import annotations

import os

import pytest

from concurrent_dataloader.testing import ObjectServer
from tests.testing.s3_conformance import S3Conformance
from tests.testing.s3_raw import Endpoint, endpoint_of

PREFIX = "CONCURRENT_DATALOADER_TEST_S3_"
NAMES = [PREFIX + name for name in ("ENDPOINT", "ACCESS_KEY", "SECRET_KEY")]


class TestObjectServer(S3Conformance):
    @pytest.fixture
    def endpoint(self, object_server: ObjectServer) -> Endpoint:
        return endpoint_of(object_server)


if f"{PREFIX}ENDPOINT" in os.environ:

    @pytest.mark.network
    class TestRealServer(S3Conformance):
        @pytest.fixture
        def endpoint(self) -> Endpoint:
            return Endpoint(
                os.environ[f"{PREFIX}ENDPOINT"],
                os.environ[f"{PREFIX}ACCESS_KEY"],
                os.environ[f"{PREFIX}SECRET_KEY"],
                os.environ.get(f"{PREFIX}REGION", "us-east-1"),
            )

else:

    @pytest.mark.network
    @pytest.mark.skip(reason=f"no S3 server to compare with: set {', '.join(NAMES)}")
    def test_a_real_server_is_the_same() -> None:
        """Stand for all tests of the class above in the summary, in one line."""
