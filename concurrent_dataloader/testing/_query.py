"""What a request's query asks of a listing, and what it is told to ask by next. Pure."""

from __future__ import annotations

import base64
import urllib.parse
from collections.abc import Callable
from typing import Final

from concurrent_dataloader.testing._answer import escape_xml
from concurrent_dataloader.testing._listing import Page
from concurrent_dataloader.testing._refusals import S3Error

_MAX_COUNT: Final = 2**31 - 1


def read_count(query: dict[str, str], name: str, usual: int) -> int:
    """Read a number; one that limits a page is 1000 at most, as S3's is."""
    count = read_number(query.get(name) or str(usual))
    if count is None:
        raise S3Error("InvalidArgument", f"{name} must be an integer from 0 to {_MAX_COUNT}")
    return min(count, 1000) if name.startswith("max-") else count


def read_number(text: str) -> int | None:
    """Read decimal digits; None where something else stands there, or more than S3 counts to."""
    # `isdigit` alone takes ² too, of which `int` makes nothing, as of more than 4,300 digits.
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0")
    if len(digits) > len(str(_MAX_COUNT)):
        return None
    number = int(digits or "0")
    return number if number <= _MAX_COUNT else None


def choose_quote(query: dict[str, str]) -> Callable[[str], str]:
    """Choose how keys are written into XML: as URLs are, where that is asked for."""
    if query.get("encoding-type") == "url":
        return lambda text: urllib.parse.quote(text, safe="-._~/*")
    return escape_xml


def next_page(page: Page, query: dict[str, str], quote: Callable[[str], str]) -> list[str]:
    """Write what the second version of ListObjects says of a page: its number of keys, its place.

    The token is that of `read_token`.
    """
    parts = [f"<KeyCount>{len(page.objects) + len(page.prefixes)}</KeyCount>"]
    if "start-after" in query:
        parts.append(f"<StartAfter>{quote(query['start-after'])}</StartAfter>")
    if "continuation-token" in query:
        token = escape_xml(query["continuation-token"])
        parts.append(f"<ContinuationToken>{token}</ContinuationToken>")
    if page.is_truncated:
        token = base64.urlsafe_b64encode(page.last.encode()).decode()
        parts.append(f"<NextContinuationToken>{token}</NextContinuationToken>")
    return parts


def next_marker(page: Page, query: dict[str, str], quote: Callable[[str], str]) -> list[str]:
    """Write what the first version of ListObjects says of a page's place."""
    parts = [f"<Marker>{quote(query.get('marker', ''))}</Marker>"]
    if page.is_truncated and query.get("delimiter"):
        parts.append(f"<NextMarker>{quote(page.last)}</NextMarker>")
    return parts


def read_token(token: str) -> str:
    """Read the key or prefix after which a page begins; refuses what is no token of ours."""
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise S3Error("InvalidArgument", "The continuation token is not one of ours") from error
