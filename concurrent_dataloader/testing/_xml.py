"""S3's XML, written and read."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Final

from concurrent_dataloader.testing._answer import Answer, answer_with
from concurrent_dataloader.testing._refusals import S3Error

_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"


def answer_with_xml(name: str, content: str) -> Answer:
    """Answer 200 with one element of S3's namespace; ``content`` is XML."""
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="{_NAMESPACE}">{content}</{name}>'
    )
    return answer_with(200, text.encode())


def parse_xml(body: bytes) -> ET.Element:
    """Parse a body; refuses what is not well-formed with MalformedXML."""
    # Entities could blow up a small document; S3's have none.
    if b"<!" in body:
        raise S3Error("MalformedXML")
    try:
        return ET.fromstring(body)
    except ET.ParseError as error:
        raise S3Error("MalformedXML") from error


def children(element: ET.Element, name: str) -> list[ET.Element]:
    """Give the children of a name, in S3's namespace or in none; clients send both."""
    return [child for child in element if child.tag.rpartition("}")[2] == name]


def text_of(element: ET.Element, name: str) -> str:
    """Give the text of the one child of a name; refuses any other number of them."""
    found = children(element, name)
    if len(found) != 1 or found[0].text is None:
        raise S3Error("MalformedXML")
    return found[0].text
