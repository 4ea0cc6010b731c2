"""What the tests of the object server share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.testing.s3_conformance")
