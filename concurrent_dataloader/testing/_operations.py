"""What S3 does with a request: objects, buckets, listings, multipart uploads.

Source: Amazon S3 API reference, each operation by the name of its method here.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
import urllib.parse
from collections.abc import Callable
from typing import Final

from concurrent_dataloader.testing._answer import (
    Answer,
    answer_with,
    escape_xml,
    iso_date,
    object_fields,
    plain_head,
    status_line,
)
from concurrent_dataloader.testing._headers import (
    KEPT_HEADERS,
    check_conditions,
    check_digests,
    check_length,
    check_put_conditions,
    has_range,
    is_conditional,
    is_public,
    kept_headers,
    read_range,
)
from concurrent_dataloader.testing._listing import Page, list_page
from concurrent_dataloader.testing._objects import (
    Buckets,
    FileBody,
    Part,
    StoredObject,
    Upload,
    etag_of_parts,
    make_object,
    start_upload,
)
from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import Request
from concurrent_dataloader.testing._xml import answer_with_xml, children, parse_xml, text_of

_MIN_PART_BYTES: Final = 5 << 20
_MAX_PARTS: Final = 10_000
_MAX_KEY_BYTES: Final = 1024
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]").fullmatch
# Parameters that choose another operation; all others only tune the one that the method names.
_SUBRESOURCES: Final = frozenset(
    {
        "accelerate",
        "acl",
        "attributes",
        "cors",
        "delete",
        "encryption",
        "inventory",
        "legal-hold",
        "lifecycle",
        "location",
        "logging",
        "metrics",
        "notification",
        "object-lock",
        "ownershipControls",
        "policy",
        "policyStatus",
        "publicAccessBlock",
        "replication",
        "requestPayment",
        "restore",
        "retention",
        "select",
        "tagging",
        "torrent",
        "uploadId",
        "uploads",
        "versioning",
        "versions",
        "website",
    }
)

_Operation = Callable[[Request, str, str], Answer]


class Operations:
    """S3's operations on the buckets of the server; whoever calls has checked who asks."""

    def __init__(self, buckets: Buckets, region: str) -> None:
        self._buckets = buckets
        self._region = region
        self._by_name: dict[tuple[bytes, str, str], _Operation] = {
            (b"GET", "service", ""): self._list_buckets,
            (b"PUT", "bucket", ""): self._create_bucket,
            (b"HEAD", "bucket", ""): self._head_bucket,
            (b"GET", "bucket", ""): self._list_objects,
            (b"DELETE", "bucket", ""): self._delete_bucket,
            (b"GET", "bucket", "location"): self._get_bucket_location,
            (b"GET", "bucket", "versioning"): self._get_bucket_versioning,
            (b"GET", "bucket", "uploads"): self._list_multipart_uploads,
            (b"POST", "bucket", "delete"): self._delete_objects,
            (b"GET", "object", ""): self._get_object,
            (b"HEAD", "object", ""): self._get_object,
            (b"PUT", "object", ""): self._put_object,
            (b"DELETE", "object", ""): self._delete_object,
            (b"POST", "object", "uploads"): self._create_multipart_upload,
            (b"PUT", "object", "uploadId"): self._upload_part,
            (b"GET", "object", "uploadId"): self._list_parts,
            (b"POST", "object", "uploadId"): self._complete_multipart_upload,
            (b"DELETE", "object", "uploadId"): self._abort_multipart_upload,
        }

    def answer(self, request: Request, bucket: str, key: str) -> Answer:
        """Do what is asked for; ``bucket`` and ``key`` are empty where the request names none."""
        level = "object" if key else "bucket" if bucket else "service"
        chosen = _SUBRESOURCES.intersection(request.query) if request.query else ()
        subresource = min(chosen) if chosen else ""
        operation = self._by_name.get((request.method, level, subresource))
        if operation is None:
            raise S3Error("NotImplemented" if subresource else "MethodNotAllowed")
        if len(key) > _MAX_KEY_BYTES // 4 and len(key.encode()) > _MAX_KEY_BYTES:
            raise S3Error("KeyTooLongError")
        return operation(request, bucket, key)

    # Buckets

    def _list_buckets(self, request: Request, bucket: str, key: str) -> Answer:
        entries = "".join(
            f"<Bucket><Name>{found.name}</Name>"
            f"<CreationDate>{iso_date(found.created_s)}</CreationDate></Bucket>"
            for _, found in sorted(self._buckets.by_name.items())
        )
        return answer_with_xml(
            "ListAllMyBucketsResult",
            f"<Owner><ID>owner</ID><DisplayName>owner</DisplayName></Owner>"
            f"<Buckets>{entries}</Buckets>",
        )

    def _create_bucket(self, request: Request, bucket: str, key: str) -> Answer:
        if not _BUCKET_NAME(bucket):
            raise S3Error("InvalidBucketName")
        # In us-east-1 making a bucket again is no error, and changes nothing.
        if bucket not in self._buckets.by_name:
            self._buckets.create(bucket).is_listed = is_public(request)
        elif self._region != "us-east-1":
            raise S3Error("BucketAlreadyOwnedByYou")
        return answer_with(200, headers={"Location": f"/{bucket}"})

    def _head_bucket(self, request: Request, bucket: str, key: str) -> Answer:
        self._buckets.find(bucket)
        return answer_with(200, headers={"x-amz-bucket-region": self._region})

    def _delete_bucket(self, request: Request, bucket: str, key: str) -> Answer:
        if self._buckets.find(bucket).objects:
            raise S3Error("BucketNotEmpty")
        del self._buckets.by_name[bucket]
        return answer_with(204)

    def _get_bucket_location(self, request: Request, bucket: str, key: str) -> Answer:
        self._buckets.find(bucket)
        return answer_with_xml(
            "LocationConstraint", "" if self._region == "us-east-1" else self._region
        )

    def _get_bucket_versioning(self, request: Request, bucket: str, key: str) -> Answer:
        self._buckets.find(bucket)
        return answer_with_xml("VersioningConfiguration", "")

    def _list_objects(self, request: Request, bucket: str, key: str) -> Answer:
        found = self._buckets.find(bucket)
        query = request.query
        is_second = query.get("list-type") == "2"
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        max_keys = _read_count(query, "max-keys", 1000)
        after = query.get("start-after" if is_second else "marker", "")
        if is_second and "continuation-token" in query:
            after = _read_token(query["continuation-token"])
        page = list_page(found, prefix, delimiter, after, max_keys)
        quote = _quoter(query)
        parts = [
            f"<Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix><MaxKeys>{max_keys}</MaxKeys>"
            f"<IsTruncated>{'true' if page.is_truncated else 'false'}</IsTruncated>"
        ]
        if delimiter:
            parts.append(f"<Delimiter>{quote(delimiter)}</Delimiter>")
        if "encoding-type" in query:
            parts.append("<EncodingType>url</EncodingType>")
        parts += _next_page(page, query, quote) if is_second else _next_marker(page, query, quote)
        for stored in page.objects:
            parts.append(
                f"<Contents><Key>{quote(stored.key)}</Key>"
                f"<LastModified>{iso_date(stored.modified_s)}</LastModified>"
                f"<ETag>&quot;{stored.etag}&quot;</ETag><Size>{stored.size_bytes}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
        parts += [
            f"<CommonPrefixes><Prefix>{quote(common)}</Prefix></CommonPrefixes>"
            for common in page.prefixes
        ]
        return answer_with_xml("ListBucketResult", "".join(parts))

    def _delete_objects(self, request: Request, bucket: str, key: str) -> Answer:
        found = self._buckets.find(bucket)
        check_digests(request)
        root = parse_xml(request.body)
        keys = [text_of(entry, "Key") for entry in children(root, "Object")]
        if not 1 <= len(keys) <= 1000:
            raise S3Error("MalformedXML")
        for one in keys:
            found.remove(one)
        is_quiet = any(element.text == "true" for element in children(root, "Quiet"))
        entries = [f"<Deleted><Key>{escape_xml(one)}</Key></Deleted>" for one in keys]
        return answer_with_xml("DeleteResult", "" if is_quiet else "".join(entries))

    # Objects

    def _get_object(self, request: Request, bucket: str, key: str) -> Answer:
        stored = self._buckets.find_object(bucket, key)
        headers = request.headers
        is_head = request.method == b"HEAD"
        if not request.query and b"range" not in headers and not is_conditional(headers):
            stop = 0 if is_head else stored.size_bytes
            return Answer(200, plain_head(stored), stored.body, 0, stop)
        refused = check_conditions(headers, stored)
        if refused == 304:
            return Answer(304, status_line(304) + object_fields(stored))
        if refused:
            raise S3Error("PreconditionFailed")
        start, stop = read_range(headers.get(b"range"), stored.size_bytes)
        head = b"Content-Length: %d\r\n%s" % (stop - start, _fields(request, stored))
        status = 200
        if b"range" in headers and (stop - start < stored.size_bytes or has_range(headers)):
            status = 206
            head = b"Content-Range: bytes %d-%d/%d\r\n%s" % (
                start,
                stop - 1,
                stored.size_bytes,
                head,
            )
        elif headers.get(b"x-amz-checksum-mode", b"").upper() == b"ENABLED":
            lines = [
                f"x-amz-checksum-{name}: {sum_}\r\n" for name, sum_ in stored.checksums.items()
            ]
            head += "".join(lines).encode()
        return Answer(
            status, status_line(status) + head, stored.body, start, start if is_head else stop
        )

    def _put_object(self, request: Request, bucket: str, key: str) -> Answer:
        found = self._buckets.find(bucket)
        present = found.objects.get(key)
        check_put_conditions(request.headers, present)
        if b"x-amz-copy-source" in request.headers:
            return self._copy_object(request, bucket, key)
        check_length(request)
        checksums = check_digests(request)
        stored = make_object(
            key,
            request.body,
            headers=kept_headers(request),
            checksums=checksums,
            is_public=is_public(request),
        )
        found.add(stored)
        headers = {f"x-amz-checksum-{name}": sum_ for name, sum_ in checksums.items()}
        return answer_with(200, headers={"ETag": f'"{stored.etag}"', **headers})

    def _copy_object(self, request: Request, bucket: str, key: str) -> Answer:
        source = self._find_source(request)
        replaces = request.headers.get(b"x-amz-metadata-directive", b"").upper() == b"REPLACE"
        if source is self._buckets.find(bucket).objects.get(key) and not replaces:
            raise S3Error(
                "InvalidRequest",
                "This copy request copies an object to itself and changes nothing.",
            )
        stored = make_object(
            key,
            _read_all(source),
            headers=kept_headers(request) if replaces else source.headers,
            checksums=source.checksums,
            is_public=is_public(request),
        )
        self._buckets.find(bucket).add(stored)
        return answer_with_xml(
            "CopyObjectResult",
            f"<LastModified>{iso_date(stored.modified_s)}</LastModified>"
            f"<ETag>&quot;{stored.etag}&quot;</ETag>",
        )

    def _find_source(self, request: Request) -> StoredObject:
        raw = request.headers[b"x-amz-copy-source"].decode("latin-1")
        path = urllib.parse.unquote(raw.partition("?versionId=")[0]).removeprefix("/")
        bucket, _, key = path.partition("/")
        if not key:
            raise S3Error("InvalidArgument", "x-amz-copy-source must be bucket/key")
        source = self._buckets.find_object(bucket, key)
        prefix = b"x-amz-copy-source-"
        conditions = {
            name.removeprefix(prefix): value
            for name, value in request.headers.items()
            if name.startswith(prefix)
        }
        if check_conditions(conditions, source):
            raise S3Error("PreconditionFailed")
        return source

    def _delete_object(self, request: Request, bucket: str, key: str) -> Answer:
        self._buckets.find(bucket).remove(key)
        return answer_with(204)

    # Multipart uploads

    def _create_multipart_upload(self, request: Request, bucket: str, key: str) -> Answer:
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

    def _upload_part(self, request: Request, bucket: str, key: str) -> Answer:
        upload = self._find_upload(request, bucket, key)
        number = _read_count(request.query, "partNumber", 0)
        if not 1 <= number <= _MAX_PARTS:
            raise S3Error("InvalidArgument", f"partNumber must be 1 to {_MAX_PARTS}")
        if b"x-amz-copy-source" in request.headers:
            source = self._find_source(request)
            byte_range = request.headers.get(b"x-amz-copy-source-range")
            start, stop = read_range(byte_range, source.size_bytes)
            body = _read_all(source)[start:stop]
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

    def _list_parts(self, request: Request, bucket: str, key: str) -> Answer:
        upload = self._find_upload(request, bucket, key)
        after = _read_count(request.query, "part-number-marker", 0)
        max_parts = _read_count(request.query, "max-parts", 1000)
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

    def _list_multipart_uploads(self, request: Request, bucket: str, key: str) -> Answer:
        prefix = request.query.get("prefix", "")
        quote = _quoter(request.query)
        uploads = sorted(
            (upload.key, upload.upload_id, upload.started_s)
            for upload in self._buckets.find(bucket).uploads.values()
            if upload.key.startswith(prefix)
        )
        entries = "".join(
            f"<Upload><Key>{quote(name)}</Key><UploadId>{upload_id}</UploadId>"
            f"<Initiated>{iso_date(started_s)}</Initiated></Upload>"
            for name, upload_id, started_s in uploads
        )
        return answer_with_xml(
            "ListMultipartUploadsResult",
            f"<Bucket>{bucket}</Bucket><Prefix>{quote(prefix)}</Prefix>"
            f"<MaxUploads>1000</MaxUploads><IsTruncated>false</IsTruncated>{entries}",
        )

    def _complete_multipart_upload(self, request: Request, bucket: str, key: str) -> Answer:
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

    def _abort_multipart_upload(self, request: Request, bucket: str, key: str) -> Answer:
        upload = self._find_upload(request, bucket, key)
        del self._buckets.find(bucket).uploads[upload.upload_id]
        return answer_with(204)


def _fields(request: Request, stored: StoredObject) -> bytes:
    """Give an object's header lines, with those that the query replaces."""
    replaced = {
        name.removeprefix("response-"): value
        for name, value in request.query.items()
        if name.startswith("response-") and name.removeprefix("response-").encode() in KEPT_HEADERS
    }
    fields = object_fields(stored)
    if replaced:
        lines = [
            line
            for line in fields.split(b"\r\n")
            if line.partition(b":")[0].lower().decode() not in replaced
        ]
        added = "".join(f"{name}: {value}\r\n" for name, value in replaced.items())
        if "\n" in added.replace("\r\n", "") or added.count("\r\n") != len(replaced):
            raise S3Error("InvalidArgument")
        fields = b"\r\n".join(lines) + added.encode("latin-1", "replace")
    return fields


def _read_all(stored: StoredObject) -> bytes:
    body = stored.body
    return body.read(0, stored.size_bytes) if isinstance(body, FileBody) else body


def _chosen_parts(upload: Upload, body: bytes) -> list[Part]:
    chosen: list[tuple[int, str]] = []
    for entry in children(parse_xml(body), "Part"):
        number = text_of(entry, "PartNumber")
        if not number.isdigit():
            raise S3Error("MalformedXML")
        chosen.append((int(number), text_of(entry, "ETag").strip('"')))
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


def _read_count(query: dict[str, str], name: str, usual: int) -> int:
    text = query.get(name) or str(usual)
    if not text.isdigit():
        raise S3Error("InvalidArgument", f"{name} must be an integer of 0 or more")
    return min(int(text), 1000) if name.startswith("max-") else int(text)


def _quoter(query: dict[str, str]) -> Callable[[str], str]:
    if query.get("encoding-type") == "url":
        return lambda text: urllib.parse.quote(text, safe="-._~/*")
    return escape_xml


def _next_page(page: Page, query: dict[str, str], quote: Callable[[str], str]) -> list[str]:
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


def _next_marker(page: Page, query: dict[str, str], quote: Callable[[str], str]) -> list[str]:
    parts = [f"<Marker>{quote(query.get('marker', ''))}</Marker>"]
    if page.is_truncated and query.get("delimiter"):
        parts.append(f"<NextMarker>{quote(page.last)}</NextMarker>")
    return parts


def _read_token(token: str) -> str:
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise S3Error("InvalidArgument", "The continuation token is not one of ours") from error
