"""What S3 does with objects that are uploaded in parts.

Source: Amazon S3 API reference, each operation by the name of its method here.
"""

from __future__ import annotations

import hashlib
import time
from typing import Final

from concurrent_dataloader.testing._answer import Answer, answer_with, escape_xml, iso_date
from concurrent_dataloader.testing._headers import (
    check_digests,
    check_length,
    check_put_conditions,
    find_copy_source,
    is_public,
    kept_headers,
    read_range,
)
from concurrent_dataloader.testing._listing import list_uploads
from concurrent_dataloader.testing._objects import (
    Buckets,
    Part,
    Upload,
    etag_of_parts,
    make_object,
    start_upload,
)
from concurrent_dataloader.testing._query import choose_quote, read_count, read_number
from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import Request
from concurrent_dataloader.testing._xml import answer_with_xml, children, parse_xml, text_of

_MIN_PART_BYTES: Final = 5 << 20
_MAX_PARTS: Final = 10_000


class MultipartUploads:
    """S3's operations on uploads in parts; whoever calls has checked who asks."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets

    def create_multipart_upload(self, request: Request, bucket: str, key: str) -> Answer:
        """Begin an upload."""
        found = self._buckets.find(bucket)
        upload = start_upload(found, key, kept_headers(request), is_public(request))
        return answer_with_xml(
            "InitiateMultipartUploadResult",
            f"<Bucket>{bucket}</Bucket><Key>{escape_xml(key)}</Key>"
            f"<UploadId>{upload.upload_id}</UploadId>",
        )

    def _find_upload(self, request: Request, bucket: str, key: str) -> Upload:
        upload = self._buckets.find(bucket).uploads.get(request.query["uploadId"])
        if upload is None or upload.key != key:
            raise S3Error("NoSuchUpload")
        return upload

    def upload_part(self, request: Request, bucket: str, key: str) -> Answer:
        """Keep a part, in place of one of the same number; it is sent, or copied of an object."""
        upload = self._find_upload(request, bucket, key)
        number = read_count(request.query, "partNumber", 0)
        if not 1 <= number <= _MAX_PARTS:
            raise S3Error("InvalidArgument", f"partNumber must be 1 to {_MAX_PARTS}")
        if b"x-amz-copy-source" in request.headers:
            source = find_copy_source(request, self._buckets)
            byte_range = request.headers.get(b"x-amz-copy-source-range")
            start, stop = read_range(byte_range, source.size_bytes)
            body = source.read_all()[start:stop]
        else:
            check_length(request)
            check_digests(request)
            body = request.body
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        part = Part(body, etag, int(time.time()))
        upload.parts[number] = part
        if b"x-amz-copy-source" in request.headers:
            return answer_with_xml(
                "CopyPartResult",
                f"<LastModified>{iso_date(part.modified_s)}</LastModified>"
                f"<ETag>&quot;{etag}&quot;</ETag>",
            )
        return answer_with(200, headers={"ETag": f'"{etag}"'})

    def list_parts(self, request: Request, bucket: str, key: str) -> Answer:
        """List the parts of an upload that is under way."""
        upload = self._find_upload(request, bucket, key)
        after = read_count(request.query, "part-number-marker", 0)
        max_parts = read_count(request.query, "max-parts", 1000)
        numbers = sorted(number for number in upload.parts if number > after)
        shown = numbers[:max_parts]
        entries = "".join(
            f"<Part><PartNumber>{number}</PartNumber>"
            f"<LastModified>{iso_date(part.modified_s)}</LastModified>"
            f"<ETag>&quot;{part.etag}&quot;</ETag><Size>{len(part.body)}</Size></Part>"
            for number, part in ((number, upload.parts[number]) for number in shown)
        )
        return answer_with_xml(
            "ListPartsResult",
            f"<Bucket>{bucket}</Bucket><Key>{escape_xml(key)}</Key>"
            f"<UploadId>{upload.upload_id}</UploadId><PartNumberMarker>{after}</PartNumberMarker>"
            f"<NextPartNumberMarker>{shown[-1] if shown else 0}</NextPartNumberMarker>"
            f"<MaxParts>{max_parts}</MaxParts>"
            f"<IsTruncated>{'true' if len(numbers) > len(shown) else 'false'}</IsTruncated>"
            f"<StorageClass>STANDARD</StorageClass>{entries}",
        )

    def list_multipart_uploads(self, request: Request, bucket: str, key: str) -> Answer:
        """List the uploads that are under way, a page of them, by key and when they began."""
        found, query = self._buckets.find(bucket), request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after_key, after_id = query.get("key-marker", ""), query.get("upload-id-marker", "")
        max_uploads = read_count(query, "max-uploads", 1000)
        page = list_uploads(found, prefix, delimiter, after_key, after_id, max_uploads)
        quote = choose_quote(query)
        parts = [
            f"<Bucket>{bucket}</Bucket><KeyMarker>{quote(after_key)}</KeyMarker>"
            f"<UploadIdMarker>{escape_xml(after_id)}</UploadIdMarker>"
            f"<Prefix>{quote(prefix)}</Prefix><MaxUploads>{max_uploads}</MaxUploads>"
            f"<IsTruncated>{'true' if page.is_truncated else 'false'}</IsTruncated>"
        ]
        if page.is_truncated:
            parts.append(
                f"<NextKeyMarker>{quote(page.last_key)}</NextKeyMarker>"
                f"<NextUploadIdMarker>{page.last_id}</NextUploadIdMarker>"
            )
        if delimiter:
            parts.append(f"<Delimiter>{quote(delimiter)}</Delimiter>")
        if "encoding-type" in query:
            parts.append("<EncodingType>url</EncodingType>")
        parts += [
            f"<Upload><Key>{quote(upload.key)}</Key><UploadId>{upload.upload_id}</UploadId>"
            f"<StorageClass>STANDARD</StorageClass>"
            f"<Initiated>{iso_date(upload.started_s)}</Initiated></Upload>"
            for upload in page.uploads
        ]
        parts += [
            f"<CommonPrefixes><Prefix>{quote(common)}</Prefix></CommonPrefixes>"
            for common in page.prefixes
        ]
        return answer_with_xml("ListMultipartUploadsResult", "".join(parts))

    def complete_multipart_upload(self, request: Request, bucket: str, key: str) -> Answer:
        """Make the object of the parts that the body names."""
        found = self._buckets.find(bucket)
        upload = self._find_upload(request, bucket, key)
        check_put_conditions(request.headers, found.objects.get(key))
        parts = _chosen_parts(upload, request.body)
        etag = etag_of_parts([part.etag for part in parts])
        stored = make_object(
            key,
            b"".join(part.body for part in parts),
            headers=upload.headers,
            is_public=upload.is_public,
            etag=etag,
        )
        found.add(stored)
        del found.uploads[upload.upload_id]
        return answer_with_xml(
            "CompleteMultipartUploadResult",
            f"<Location>/{bucket}/{escape_xml(key)}</Location><Bucket>{bucket}</Bucket>"
            f"<Key>{escape_xml(key)}</Key><ETag>&quot;{etag}&quot;</ETag>",
        )

    def abort_multipart_upload(self, request: Request, bucket: str, key: str) -> Answer:
        """Forget an upload and its parts."""
        upload = self._find_upload(request, bucket, key)
        del self._buckets.find(bucket).uploads[upload.upload_id]
        return answer_with(204)


def _chosen_parts(upload: Upload, body: bytes) -> list[Part]:
    chosen: list[tuple[int, str]] = []
    for entry in children(parse_xml(body), "Part"):
        number = read_number(text_of(entry, "PartNumber"))
        if number is None:
            raise S3Error("MalformedXML")
        chosen.append((number, text_of(entry, "ETag").strip('"')))
    if not chosen:
        raise S3Error("MalformedXML")
    numbers = [number for number, _ in chosen]
    if numbers != sorted(set(numbers)):
        raise S3Error("InvalidPartOrder")
    parts: list[Part] = []
    for number, etag in chosen:
        part = upload.parts.get(number)
        if part is None or part.etag != etag:
            raise S3Error("InvalidPart")
        parts.append(part)
    if any(len(part.body) < _MIN_PART_BYTES for part in parts[:-1]):
        raise S3Error("EntityTooSmall")
    return parts
