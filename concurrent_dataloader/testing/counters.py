"""What the server did, counted."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """What the server did since it was started or last told to count from nothing.

    Requests that control the server are not counted.
    """

    num_by_method: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Requests that arrived whole, by HTTP method."""

    num_by_status: dict[int, int] = dataclasses.field(default_factory=dict[int, int])
    """Answers begun, by status; a request that got no answer (``stalled_headers``,
    ``reset_before_headers``) is not here."""

    num_by_error: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Errors answered, by S3's code, such as ``NoSuchKey``."""

    num_by_fault: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Faults done, by kind, and as ``outage`` the requests that came while the server was down."""

    num_gets_by_key: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """GETs of objects by ``bucket/key``, whatever became of them; filled when asked for."""

    body_bytes_sent: int = 0
    """Bytes of bodies that answers handed to the network; those cut short by a fault not."""

    body_bytes_received: int = 0
    """Bytes of bodies of requests, as they came over the wire."""

    num_connections: int = 0
    """Connections that are open now."""

    num_connections_opened: int = 0
    """Connections that were opened."""

    max_connections: int = 0
    """The most connections that were open at once."""

    num_in_flight: int = 0
    """Requests that arrived and are not answered to the last byte, now."""

    max_in_flight: int = 0
    """The most requests in flight at once."""

    cpu_s: float = 0.0
    """CPU time of the server's process, user and system."""

    @property
    def num_requests(self) -> int:
        """Requests that arrived whole."""
        return sum(self.num_by_method.values())

    @property
    def num_gets(self) -> int:
        """Requests by GET, of objects, listings and the rest."""
        return self.num_by_method.get("GET", 0)
