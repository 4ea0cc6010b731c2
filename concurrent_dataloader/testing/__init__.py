"""An S3 object server with latency, faults and counters, for tests, demonstrations and benchmarks.

It listens on loopback only, keeps its objects in RAM, and is no production server.

```python
from concurrent_dataloader.testing import Fault, ObjectServer

with ObjectServer() as server:
    server.put_objects("photos", {"train/cat/1.jpg": raw})
    server.set_latency(median_s=0.1, sigma=0.3)
    server.set_faults([Fault("slow_down", rate=0.05)])
    ...  # any S3 client: server.endpoint_url, server.access_key, server.secret_key, server.region
    print(server.counters().num_by_status)
```

``pytest_plugin`` has the fixtures ``object_server`` and ``make_object_server``; ``python -m
concurrent_dataloader.testing --help`` serves by hand. How a request goes through the files here:

```text
object_server  the handle: starts the process, tells it what to do
_process       ends with its parent; _door: listens, or is shut for a while
_connection    bytes in, bytes out; latency, bandwidth, and faults as behaviour has them
_server        who may do what; hears _control; counters say what was done
_request       HTTP/1.1 requests and their bodies; _streaming: aws-chunked ones
_signature     who asks: Signature V4
_operations    what S3 does with it; _uploads: in parts; _listing: pages of keys
_headers       what headers ask: conditions, ranges, digests, copies; _query: how much of a listing
_answer        what it says; _xml: in XML; _refusals: what it says no with
_objects       buckets, objects, uploads
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent_dataloader.testing.behaviour import Fault, FaultKind, Latency, OutageKind
    from concurrent_dataloader.testing.counters import Counters
    from concurrent_dataloader.testing.object_server import ObjectServer

__all__ = ["Counters", "Fault", "FaultKind", "Latency", "ObjectServer", "OutageKind"]

# Imported when first used: pytest loads this package in each run, whether a test needs it or not.
_HOMES = {
    "Counters": "concurrent_dataloader.testing.counters",
    "Fault": "concurrent_dataloader.testing.behaviour",
    "FaultKind": "concurrent_dataloader.testing.behaviour",
    "Latency": "concurrent_dataloader.testing.behaviour",
    "ObjectServer": "concurrent_dataloader.testing.object_server",
    "OutageKind": "concurrent_dataloader.testing.behaviour",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
