"""What S3 does with a request: buckets, listings, objects; uploads in parts are in `_uploads`.

Source: Amazon S3 API reference, each operation by the name of its method here.
"""

from __future__ import annotations

import re
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
    find_copy_source,
    has_range,
    is_conditional,
    is_public,
    kept_headers,
    read_range,
)
from concurrent_dataloader.testing._listing import list_page
from concurrent_dataloader.testing._objects import Buckets, StoredObject, make_object
from concurrent_dataloader.testing._query import (
    choose_quote,
    next_marker,
    next_page,
    read_count,
    read_token,
)
from concurrent_dataloader.testing._refusals import S3Error
from concurrent_dataloader.testing._request import Request
from concurrent_dataloader.testing._uploads import MultipartUploads
from concurrent_dataloader.testing._xml import answer_with_xml, children, parse_xml, text_of

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
        uploads = MultipartUploads(buckets)
        self._by_name: dict[tuple[bytes, str, str], _Operation] = {
            (b"GET", "service", ""): self._list_buckets,
            (b"PUT", "bucket", ""): self._create_bucket,
            (b"HEAD", "bucket", ""): self._head_bucket,
            (b"GET", "bucket", ""): self._list_objects,
            (b"DELETE", "bucket", ""): self._delete_bucket,
            (b"GET", "bucket", "location"): self._get_bucket_location,
            (b"GET", "bucket", "versioning"): self._get_bucket_versioning,
            (b"GET", "bucket", "uploads"): uploads.list_multipart_uploads,
            (b"POST", "bucket", "delete"): self._delete_objects,
            (b"GET", "object", ""): self._get_object,
            (b"HEAD", "object", ""): self._get_object,
            (b"PUT", "object", ""): self._put_object,
            (b"DELETE", "object", ""): self._delete_object,
            (b"POST", "object", "uploads"): uploads.create_multipart_upload,
            (b"PUT", "object", "uploadId"): uploads.upload_part,
            (b"GET", "object", "uploadId"): uploads.list_parts,
            (b"POST", "object", "uploadId"): uploads.complete_multipart_upload,
            (b"DELETE", "object", "uploadId"): uploads.abort_multipart_upload,
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
        max_keys = read_count(query, "max-keys", 1000)
        after = query.get("start-after" if is_second else "marker", "")
        if is_second and "continuation-token" in query:
            after = read_token(query["continuation-token"])
        page = list_page(found, prefix, delimiter, after, max_keys)
        quote = choose_quote(query)
        parts = [
            f"<Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix><MaxKeys>{max_keys}</MaxKeys>"
            f"<IsTruncated>{'true' if page.is_truncated else 'false'}</IsTruncated>"
        ]
        if delimiter:
            parts.append(f"<Delimiter>{quote(delimiter)}</Delimiter>")
        if "encoding-type" in query:
            parts.append("<EncodingType>url</EncodingType>")
        parts += next_page(page, query, quote) if is_second else next_marker(page, query, quote)
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
        source = find_copy_source(request, self._buckets)
        replaces = request.headers.get(b"x-amz-metadata-directive", b"").upper() == b"REPLACE"
        if source is self._buckets.find(bucket).objects.get(key) and not replaces:
            raise S3Error(
                "InvalidRequest",
                "This copy request copies an object to itself and changes nothing.",
            )
        stored = make_object(
            key,
            source.read_all(),
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

    def _delete_object(self, request: Request, bucket: str, key: str) -> Answer:
        self._buckets.find(bucket).remove(key)
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
