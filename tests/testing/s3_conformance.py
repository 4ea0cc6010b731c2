"""What an S3 server does: the same tests for ours and for a real one.

Where Ceph 16 differs from Amazon's reference (the codes of a few refusals, the order of parts, the
location of a bucket, new checksums), ours keeps to the reference, in ``test_operations.py``.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import itertools
import os
import socket
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.testing.s3_raw import Endpoint, ask, ask_signed, sign

BODY = bytes(range(256)) * 40
PART = os.urandom(5 << 20)


_SESSION = boto3.Session()  # one for all: it keeps the description of the service


def make_client(endpoint: Endpoint, **overrides: Any) -> Any:
    """Make a boto3 client that asks once and does as it is told."""
    settings: dict[str, Any] = {
        "endpoint_url": endpoint.url,
        "aws_access_key_id": endpoint.access_key,
        "aws_secret_access_key": endpoint.secret_key,
        "region_name": endpoint.region,
    }
    config = Config(
        s3={"addressing_style": "path"},
        signature_version="s3v4",
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    chosen: dict[str, Any] = {**settings, "config": config, **overrides}
    return _SESSION.client("s3", **chosen)


def refusal(error: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    """Give status and code of an answer that boto3 raised."""
    response = error.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


class S3Conformance:
    """Subclasses give the fixture ``endpoint``."""

    @pytest.fixture
    def s3(self, endpoint: Endpoint) -> Iterator[Any]:
        client = make_client(endpoint)
        yield client
        client.close()

    @pytest.fixture
    def bucket(self, s3: Any) -> Iterator[str]:
        name = f"test-{uuid.uuid4().hex[:16]}"
        s3.create_bucket(Bucket=name)
        yield name
        for upload in s3.list_multipart_uploads(Bucket=name).get("Uploads", []):
            s3.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=name):
            for found in page.get("Contents", []):
                s3.delete_object(Bucket=name, Key=found["Key"])
        s3.delete_bucket(Bucket=name)

    # Objects

    def test_an_object_comes_back_as_it_was_put(self, s3: Any, bucket: str) -> None:
        put = s3.put_object(Bucket=bucket, Key="a/b.bin", Body=BODY)
        got = s3.get_object(Bucket=bucket, Key="a/b.bin")

        assert got["Body"].read() == BODY
        assert got["ContentLength"] == len(BODY)
        assert got["ETag"] == put["ETag"] == f'"{hashlib.md5(BODY).hexdigest()}"'
        assert got["AcceptRanges"] == "bytes"
        age = datetime.datetime.now(datetime.UTC) - got["LastModified"]
        assert abs(age.total_seconds()) < 60

    def test_an_empty_object_comes_back_empty(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="empty", Body=b"")

        assert s3.get_object(Bucket=bucket, Key="empty")["Body"].read() == b""
        assert s3.head_object(Bucket=bucket, Key="empty")["ContentLength"] == 0

    def test_a_second_put_replaces_the_first(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"first")
        s3.put_object(Bucket=bucket, Key="a", Body=b"second one")

        assert s3.get_object(Bucket=bucket, Key="a")["Body"].read() == b"second one"

    def test_metadata_and_content_headers_are_kept(self, s3: Any, bucket: str) -> None:
        s3.put_object(
            Bucket=bucket,
            Key="a",
            Body=b"x",
            ContentType="image/jpeg",
            CacheControl="max-age=5",
            ContentDisposition='attachment; filename="a.jpg"',
            Metadata={"class": "n01440764", "n": "2"},
        )

        for answer in (
            s3.get_object(Bucket=bucket, Key="a"),
            s3.head_object(Bucket=bucket, Key="a"),
        ):
            assert answer["ContentType"] == "image/jpeg"
            assert answer["CacheControl"] == "max-age=5"
            assert answer["ContentDisposition"] == 'attachment; filename="a.jpg"'
            assert answer["Metadata"] == {"class": "n01440764", "n": "2"}

    def test_a_head_says_what_a_get_says_without_a_body(
        self, s3: Any, bucket: str, endpoint: Endpoint
    ) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)

        got = ask_signed(endpoint, "GET", f"/{bucket}/a")
        head = ask_signed(endpoint, "HEAD", f"/{bucket}/a")

        assert head.body == b""
        for name in ("content-length", "etag", "last-modified", "content-type", "accept-ranges"):
            assert head.headers[name] == got.headers[name]

    @pytest.mark.parametrize(
        "key",
        [
            "a b",
            "a+b",
            "ü/日本",
            "a%20b",
            "a&b=c?d#e",
            "a//b",
            "/a",
            "~-_.*'()",
            'q"<>&',
            "a\\b",
            "a\nb",
        ],
    )
    def test_odd_keys_are_kept_byte_by_byte(self, s3: Any, bucket: str, key: str) -> None:
        s3.put_object(Bucket=bucket, Key=key, Body=key.encode())

        assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == key.encode()
        assert [o["Key"] for o in s3.list_objects_v2(Bucket=bucket)["Contents"]] == [key]

    def test_a_deleted_object_is_gone_and_may_be_deleted_again(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"x")

        statuses = [
            s3.delete_object(Bucket=bucket, Key="a")["ResponseMetadata"]["HTTPStatusCode"]
            for _ in range(2)
        ]

        assert statuses == [204, 204]
        with pytest.raises(ClientError) as error:
            s3.get_object(Bucket=bucket, Key="a")
        assert refusal(error) == (404, "NoSuchKey")

    def test_many_objects_are_deleted_at_once(self, s3: Any, bucket: str) -> None:
        keys = ["a", "b c", "d&<e>", "not there"]
        for key in keys[:3]:
            s3.put_object(Bucket=bucket, Key=key, Body=b"x")

        told = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]})

        assert sorted(entry["Key"] for entry in told["Deleted"]) == sorted(keys)
        assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0

    def test_a_quiet_delete_says_nothing_of_what_went_well(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"x")

        told = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "a"}], "Quiet": True})

        assert "Deleted" not in told
        assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0

    # Ranges

    @pytest.mark.parametrize(
        ("header", "start", "stop"),
        [
            ("bytes=0-0", 0, 1),
            ("bytes=10-19", 10, 20),
            ("bytes=10000-", 10000, len(BODY)),
            ("bytes=-7", len(BODY) - 7, len(BODY)),
            ("bytes=-999999", 0, len(BODY)),
            ("bytes=10230-999999", 10230, len(BODY)),
            ("bytes=0-", 0, len(BODY)),
        ],
    )
    def test_a_range_gives_its_bytes_and_says_which(
        self, s3: Any, bucket: str, header: str, start: int, stop: int
    ) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)

        got = s3.get_object(Bucket=bucket, Key="a", Range=header)

        assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
        assert got["Body"].read() == BODY[start:stop]
        assert got["ContentRange"] == f"bytes {start}-{stop - 1}/{len(BODY)}"
        assert got["ContentLength"] == stop - start

    @pytest.mark.parametrize("header", [f"bytes={len(BODY)}-", "bytes=999999-9999999"])
    def test_a_range_behind_the_end_is_refused(self, s3: Any, bucket: str, header: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)

        with pytest.raises(ClientError) as error:
            s3.get_object(Bucket=bucket, Key="a", Range=header)

        assert refusal(error) == (416, "InvalidRange")

    def test_a_range_of_an_empty_object_is_refused(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"")

        with pytest.raises(ClientError) as error:
            s3.get_object(Bucket=bucket, Key="a", Range="bytes=0-9")

        assert refusal(error) == (416, "InvalidRange")

    def test_a_head_with_a_range_says_how_long_the_range_is(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)

        head = s3.head_object(Bucket=bucket, Key="a", Range="bytes=10-19")

        assert head["ContentLength"] == 10
        assert head["ResponseMetadata"]["HTTPStatusCode"] == 206

    # Conditions

    def test_a_get_is_answered_304_if_the_client_has_that_etag(self, s3: Any, bucket: str) -> None:
        etag = s3.put_object(Bucket=bucket, Key="a", Body=BODY)["ETag"]

        with pytest.raises(ClientError) as error:
            s3.get_object(Bucket=bucket, Key="a", IfNoneMatch=etag)

        assert refusal(error)[0] == 304
        assert s3.get_object(Bucket=bucket, Key="a", IfNoneMatch='"other"')["Body"].read() == BODY

    def test_a_get_is_refused_if_the_etag_is_another(self, s3: Any, bucket: str) -> None:
        etag = s3.put_object(Bucket=bucket, Key="a", Body=BODY)["ETag"]

        with pytest.raises(ClientError) as error:
            s3.get_object(Bucket=bucket, Key="a", IfMatch='"other"')

        assert refusal(error) == (412, "PreconditionFailed")
        assert s3.get_object(Bucket=bucket, Key="a", IfMatch=etag)["Body"].read() == BODY

    def test_a_get_may_depend_on_the_time_of_the_last_change(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)
        now = datetime.datetime.now(datetime.UTC)
        hour = datetime.timedelta(hours=1)

        with pytest.raises(ClientError) as error:
            s3.get_object(Bucket=bucket, Key="a", IfUnmodifiedSince=now - hour)
        assert refusal(error) == (412, "PreconditionFailed")
        s3.get_object(Bucket=bucket, Key="a", IfModifiedSince=now - hour)
        s3.get_object(Bucket=bucket, Key="a", IfUnmodifiedSince=now + hour)

    # Listings

    def test_pages_hold_each_key_once_and_in_order(self, s3: Any, bucket: str) -> None:
        keys = sorted(f"k{number:03}" for number in range(25))
        for key in reversed(keys):
            s3.put_object(Bucket=bucket, Key=key, Body=key.encode())

        pages: list[Any] = []
        more: dict[str, Any] = {}
        while True:
            page = s3.list_objects_v2(Bucket=bucket, MaxKeys=7, **more)
            pages.append(page)
            if not page["IsTruncated"]:
                break
            more = {"ContinuationToken": page["NextContinuationToken"]}

        assert [page["KeyCount"] for page in pages] == [7, 7, 7, 4]
        listed = [entry for page in pages for entry in page["Contents"]]
        assert [entry["Key"] for entry in listed] == keys
        assert {entry["Size"] for entry in listed} == {4}
        assert listed[3]["ETag"] == f'"{hashlib.md5(b"k003").hexdigest()}"'

    def test_a_full_last_page_is_not_truncated(self, s3: Any, bucket: str) -> None:
        for key in "abc":
            s3.put_object(Bucket=bucket, Key=key, Body=b"x")

        assert s3.list_objects_v2(Bucket=bucket, MaxKeys=3)["IsTruncated"] is False
        assert s3.list_objects_v2(Bucket=bucket, MaxKeys=2)["IsTruncated"] is True

    @pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
    def test_keys_below_a_delimiter_are_folded_across_pages(
        self, s3: Any, bucket: str, page_size: int
    ) -> None:
        for key in ("a", "b/1", "b/2", "b/3", "c", "d/1/x", "d/2", "e"):
            s3.put_object(Bucket=bucket, Key=key, Body=b"x")

        pages = list(
            s3.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Delimiter="/", PaginationConfig={"PageSize": page_size}
            )
        )

        assert [o["Key"] for page in pages for o in page.get("Contents", [])] == ["a", "c", "e"]
        folded = [p["Prefix"] for page in pages for p in page.get("CommonPrefixes", [])]
        assert folded == ["b/", "d/"]

    def test_a_prefix_is_no_part_of_what_is_folded(self, s3: Any, bucket: str) -> None:
        for key in ("d/1/x", "d/1/y", "d/2", "da", "e"):
            s3.put_object(Bucket=bucket, Key=key, Body=b"x")

        page = s3.list_objects_v2(Bucket=bucket, Prefix="d/", Delimiter="/")

        assert [entry["Key"] for entry in page["Contents"]] == ["d/2"]
        assert [entry["Prefix"] for entry in page["CommonPrefixes"]] == ["d/1/"]

    def test_a_listing_starts_behind_start_after(self, s3: Any, bucket: str) -> None:
        for key in "abcd":
            s3.put_object(Bucket=bucket, Key=key, Body=b"x")

        page = s3.list_objects_v2(Bucket=bucket, StartAfter="b")

        assert [entry["Key"] for entry in page["Contents"]] == ["c", "d"]

    def test_a_listing_of_no_keys_at_most_is_empty(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"x")

        page = s3.list_objects_v2(Bucket=bucket, MaxKeys=0)

        assert page.get("Contents", []) == []
        assert page["IsTruncated"] is False

    def test_the_first_version_of_listings_pages_by_marker(self, s3: Any, bucket: str) -> None:
        keys = ["a", "b/1", "b/2", "c", "d"]
        for key in keys:
            s3.put_object(Bucket=bucket, Key=key, Body=b"x")

        plain = s3.get_paginator("list_objects").paginate(
            Bucket=bucket, PaginationConfig={"PageSize": 2}
        )
        folded = s3.get_paginator("list_objects").paginate(
            Bucket=bucket, Delimiter="/", PaginationConfig={"PageSize": 2}
        )

        assert [entry["Key"] for page in plain for entry in page["Contents"]] == keys
        pages = list(folded)
        assert [o["Key"] for page in pages for o in page.get("Contents", [])] == ["a", "c", "d"]
        assert [p["Prefix"] for page in pages for p in page.get("CommonPrefixes", [])] == ["b/"]

    # Buckets

    def test_a_bucket_is_found_and_listed(self, s3: Any, bucket: str) -> None:
        assert s3.head_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPStatusCode"] == 200
        assert bucket in [entry["Name"] for entry in s3.list_buckets()["Buckets"]]

    def test_a_bucket_that_is_there_may_be_made_again(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"x")

        s3.create_bucket(Bucket=bucket)

        assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 1

    def test_a_bucket_with_objects_is_not_deleted(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"x")

        with pytest.raises(ClientError) as error:
            s3.delete_bucket(Bucket=bucket)

        assert refusal(error) == (409, "BucketNotEmpty")

    def test_a_deleted_bucket_is_gone(self, s3: Any) -> None:
        name = f"test-{uuid.uuid4().hex[:16]}"
        s3.create_bucket(Bucket=name)
        s3.delete_bucket(Bucket=name)

        with pytest.raises(ClientError) as error:
            s3.list_objects_v2(Bucket=name)
        assert refusal(error) == (404, "NoSuchBucket")

    @pytest.mark.parametrize("name", ["ab", "A" * 5, "under_score."])
    def test_a_bucket_of_a_wrong_name_is_not_made(self, endpoint: Endpoint, name: str) -> None:
        answer = ask_signed(endpoint, "PUT", f"/{name}")

        assert (answer.status, answer.code) == (400, "InvalidBucketName")

    @pytest.mark.parametrize("operation", ["get_object", "put_object", "list_objects_v2"])
    def test_no_such_bucket_is_said_so(self, s3: Any, operation: str) -> None:
        arguments = {} if operation == "list_objects_v2" else {"Key": "a"}

        with pytest.raises(ClientError) as error:
            getattr(s3, operation)(Bucket="test-there-is-none", **arguments)

        assert refusal(error) == (404, "NoSuchBucket")

    def test_no_such_key_is_said_so(self, s3: Any, bucket: str) -> None:
        with pytest.raises(ClientError) as error:
            s3.get_object(Bucket=bucket, Key="not there")
        assert refusal(error) == (404, "NoSuchKey")

        with pytest.raises(ClientError) as error:
            s3.head_object(Bucket=bucket, Key="not there")
        assert refusal(error) == (404, "404")

    # Who asks

    def test_a_wrong_secret_is_refused(self, endpoint: Endpoint, bucket: str) -> None:
        wrong = endpoint._replace(secret_key="not the secret")

        answer = ask_signed(wrong, "GET", f"/{bucket}/a")

        assert (answer.status, answer.code) == (403, "SignatureDoesNotMatch")

    def test_an_unknown_access_key_is_refused(self, endpoint: Endpoint, bucket: str) -> None:
        answer = ask_signed(endpoint._replace(access_key="nobody"), "GET", f"/{bucket}/a")

        assert (answer.status, answer.code) == (403, "InvalidAccessKeyId")

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    def test_nobody_is_refused(self, endpoint: Endpoint, bucket: str, method: str) -> None:
        answer = ask(endpoint, method, f"/{bucket}/a")

        assert (answer.status, answer.code) == (403, "AccessDenied")

    def test_an_object_may_be_public(self, s3: Any, endpoint: Endpoint, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="open", Body=BODY, ACL="public-read")
        s3.put_object(Bucket=bucket, Key="closed", Body=BODY)

        assert ask(endpoint, "GET", f"/{bucket}/open").body == BODY
        assert ask(endpoint, "GET", f"/{bucket}/closed").status == 403
        assert ask(endpoint, "GET", f"/{bucket}?list-type=2").status == 403

    @pytest.mark.parametrize("minutes", [-20, 20])
    def test_a_request_of_another_time_is_refused(
        self, endpoint: Endpoint, bucket: str, minutes: int
    ) -> None:
        then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)

        answer = ask_signed(endpoint, "GET", f"/{bucket}/a", at=then)

        assert (answer.status, answer.code) == (403, "RequestTimeTooSkewed")

    def test_a_request_changed_on_its_way_is_refused(
        self, s3: Any, endpoint: Endpoint, bucket: str
    ) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)
        signed = sign(
            endpoint, "GET", f"/{bucket}/a?response-content-type=a", {"x-amz-meta-a": "1"}
        )

        answers = [
            ask(endpoint, "HEAD", f"/{bucket}/a?response-content-type=a", signed),
            ask(endpoint, "GET", f"/{bucket}/b?response-content-type=a", signed),
            ask(endpoint, "GET", f"/{bucket}/a?response-content-type=b", signed),
            ask(
                endpoint,
                "GET",
                f"/{bucket}/a?response-content-type=a",
                signed | {"x-amz-meta-a": "2"},
            ),
        ]

        assert [answer.status for answer in answers] == [403] * 4
        right = ask(endpoint, "GET", f"/{bucket}/a?response-content-type=a", signed)
        assert (right.status, right.headers["content-type"]) == (200, "a")

    def test_a_body_changed_on_its_way_is_refused(self, endpoint: Endpoint, bucket: str) -> None:
        signed = sign(endpoint, "PUT", f"/{bucket}/a", body=b"12345")

        answer = ask(endpoint, "PUT", f"/{bucket}/a", signed, b"12346")

        assert (answer.status, answer.code) == (400, "XAmzContentSHA256Mismatch")

    def test_a_body_may_go_unsigned(self, endpoint: Endpoint, bucket: str) -> None:
        target = f"/{bucket}/a"
        signed = sign(endpoint, "PUT", target, body=b"1", content_sha256="UNSIGNED-PAYLOAD")

        assert ask(endpoint, "PUT", target, signed, b"another").status == 200
        assert ask_signed(endpoint, "GET", target).body == b"another"

    def test_a_presigned_address_works_without_credentials(
        self, s3: Any, endpoint: Endpoint, bucket: str
    ) -> None:
        names = {"Bucket": bucket, "Key": "a b+ü"}
        put = s3.generate_presigned_url("put_object", names).removeprefix(endpoint.url)
        get = s3.generate_presigned_url("get_object", names).removeprefix(endpoint.url)

        assert ask(endpoint, "PUT", put, body=BODY).status == 200
        assert ask(endpoint, "GET", get).body == BODY

    def test_a_presigned_address_is_for_one_method_and_one_key(
        self, s3: Any, endpoint: Endpoint, bucket: str
    ) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)
        s3.put_object(Bucket=bucket, Key="b", Body=BODY)
        url = s3.generate_presigned_url("get_object", {"Bucket": bucket, "Key": "a"})
        target = url.removeprefix(endpoint.url)

        for method, other in (("PUT", target), ("GET", target.replace("/a?", "/b?"))):
            answer = ask(endpoint, method, other)
            assert (answer.status, answer.code) == (403, "SignatureDoesNotMatch")

    def test_a_presigned_address_expires(self, endpoint: Endpoint, bucket: str) -> None:
        target = presign(endpoint, f"/{bucket}/a", age_s=60, expires_s=30)

        answer = ask(endpoint, "GET", target)

        assert (answer.status, answer.code) == (403, "AccessDenied")

    # Digests

    def test_a_wrong_md5_is_refused(self, endpoint: Endpoint, bucket: str) -> None:
        wrong = base64.b64encode(hashlib.md5(b"other").digest()).decode()

        answer = ask_signed(endpoint, "PUT", f"/{bucket}/a", {"Content-MD5": wrong}, b"body")

        assert (answer.status, answer.code) == (400, "BadDigest")
        assert ask_signed(endpoint, "HEAD", f"/{bucket}/a").status == 404

    def test_a_right_md5_is_taken(self, endpoint: Endpoint, bucket: str) -> None:
        right = base64.b64encode(hashlib.md5(b"body").digest()).decode()

        answer = ask_signed(endpoint, "PUT", f"/{bucket}/a", {"Content-MD5": right}, b"body")

        assert answer.status == 200

    def test_what_is_no_md5_is_refused(self, endpoint: Endpoint, bucket: str) -> None:
        answer = ask_signed(endpoint, "PUT", f"/{bucket}/a", {"Content-MD5": "bm9uZQ=="}, b"body")

        assert (answer.status, answer.code) == (400, "InvalidDigest")

    # Multipart uploads

    def test_parts_become_one_object(self, s3: Any, bucket: str) -> None:
        started = s3.create_multipart_upload(Bucket=bucket, Key="a", ContentType="x/y")
        upload = {"Bucket": bucket, "Key": "a", "UploadId": started["UploadId"]}
        bodies = [PART, PART[::-1], b"last"]
        parts: list[dict[str, Any]] = []
        for number, body in enumerate(bodies, 1):
            told = s3.upload_part(**upload, PartNumber=number, Body=body)
            assert told["ETag"] == f'"{hashlib.md5(body).hexdigest()}"'
            parts.append({"PartNumber": number, "ETag": told["ETag"]})
        listed = s3.list_parts(**upload)["Parts"]

        done = s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        assert [(part["PartNumber"], part["Size"]) for part in listed] == [
            (1, len(PART)),
            (2, len(PART)),
            (3, 4),
        ]
        digests = b"".join(hashlib.md5(body).digest() for body in bodies)
        assert done["Key"] == "a"
        got = s3.get_object(Bucket=bucket, Key="a")
        assert got["Body"].read() == b"".join(bodies)
        assert got["ETag"].strip('"') == f"{hashlib.md5(digests).hexdigest()}-3"
        assert got["ContentType"] == "x/y"
        crossing = f"bytes={len(PART) - 2}-{len(PART) + 1}"
        part = s3.get_object(Bucket=bucket, Key="a", Range=crossing)["Body"].read()
        assert part == PART[-2:] + PART[::-1][:2]

    def test_an_upload_is_no_object_before_it_is_complete(self, s3: Any, bucket: str) -> None:
        started = s3.create_multipart_upload(Bucket=bucket, Key="a")
        upload = {"Bucket": bucket, "Key": "a", "UploadId": started["UploadId"]}
        s3.upload_part(**upload, PartNumber=1, Body=b"x")

        assert s3.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
        listed = s3.list_multipart_uploads(Bucket=bucket)["Uploads"]
        assert [(one["Key"], one["UploadId"]) for one in listed] == [("a", started["UploadId"])]

    @pytest.mark.parametrize("page_size", [1, 2, 5, 6])
    def test_pages_of_uploads_hold_each_once_and_by_key(
        self, s3: Any, bucket: str, page_size: int
    ) -> None:
        begun = [
            (key, s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"])
            for key in ("b", "a", "b", "a/2", "b", "c")
        ]

        pages = list(
            s3.get_paginator("list_multipart_uploads").paginate(
                Bucket=bucket, PaginationConfig={"PageSize": page_size}
            )
        )

        listed = [[(one["Key"], one["UploadId"]) for one in page["Uploads"]] for page in pages]
        flat = [one for uploads in listed for one in uploads]
        assert sorted(flat) == sorted(begun)
        assert [key for key, _ in flat] == ["a", "a/2", "b", "b", "b", "c"]
        assert all(len(uploads) == page_size for uploads in listed[:-1])
        is_last = [False] * (len(pages) - 1) + [True]
        assert [not page["IsTruncated"] for page in pages] == is_last
        assert {page["MaxUploads"] for page in pages} == {page_size}

    def test_an_aborted_upload_is_gone(self, s3: Any, bucket: str) -> None:
        started = s3.create_multipart_upload(Bucket=bucket, Key="a")
        upload = {"Bucket": bucket, "Key": "a", "UploadId": started["UploadId"]}
        s3.abort_multipart_upload(**upload)

        for call in (
            lambda: s3.list_parts(**upload),
            lambda: s3.upload_part(**upload, PartNumber=1, Body=b"x"),
        ):
            with pytest.raises(ClientError) as error:
                call()
            assert refusal(error) in ((404, "NoSuchUpload"), (404, "NoSuchKey"))

    @pytest.mark.parametrize(
        ("numbers", "etag", "code"),
        [([1, 3], None, "InvalidPart"), ([1, 2], "0" * 32, "InvalidPart")],
    )
    def test_parts_that_do_not_fit_are_refused(
        self, s3: Any, bucket: str, numbers: list[int], etag: str | None, code: str
    ) -> None:
        started = s3.create_multipart_upload(Bucket=bucket, Key="a")
        upload = {"Bucket": bucket, "Key": "a", "UploadId": started["UploadId"]}
        etags = {
            number: s3.upload_part(**upload, PartNumber=number, Body=PART)["ETag"]
            for number in (1, 2)
        }
        parts = [{"PartNumber": n, "ETag": etag or etags.get(n, etags[1])} for n in numbers]

        with pytest.raises(ClientError) as error:
            s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        assert refusal(error) == (400, code)

    def test_small_parts_are_refused_but_for_the_last(self, s3: Any, bucket: str) -> None:
        started = s3.create_multipart_upload(Bucket=bucket, Key="a")
        upload = {"Bucket": bucket, "Key": "a", "UploadId": started["UploadId"]}
        parts = [
            {"PartNumber": n, "ETag": s3.upload_part(**upload, PartNumber=n, Body=b"x")["ETag"]}
            for n in (1, 2)
        ]

        with pytest.raises(ClientError) as error:
            s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        assert refusal(error) == (400, "EntityTooSmall")

    def test_a_part_may_be_copied_from_an_object(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="source", Body=BODY)
        started = s3.create_multipart_upload(Bucket=bucket, Key="a")
        upload = {"Bucket": bucket, "Key": "a", "UploadId": started["UploadId"]}
        told = s3.upload_part_copy(
            **upload,
            PartNumber=1,
            CopySource={"Bucket": bucket, "Key": "source"},
            CopySourceRange="bytes=5-14",
        )
        parts = [{"PartNumber": 1, "ETag": told["CopyPartResult"]["ETag"]}]
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

        assert s3.get_object(Bucket=bucket, Key="a")["Body"].read() == BODY[5:15]

    # Copies

    def test_a_copy_has_the_bytes_and_the_metadata(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a b+ü", Body=BODY, Metadata={"n": "1"})

        told = s3.copy_object(Bucket=bucket, Key="b", CopySource={"Bucket": bucket, "Key": "a b+ü"})

        got = s3.get_object(Bucket=bucket, Key="b")
        assert (got["Body"].read(), got["Metadata"]) == (BODY, {"n": "1"})
        assert told["CopyObjectResult"]["ETag"].strip('"') == hashlib.md5(BODY).hexdigest()

    def test_a_copy_may_get_metadata_of_its_own(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY, Metadata={"n": "1"})

        s3.copy_object(
            Bucket=bucket,
            Key="a",
            CopySource=f"{bucket}/a",
            MetadataDirective="REPLACE",
            Metadata={"m": "2"},
        )

        got = s3.get_object(Bucket=bucket, Key="a")
        assert (got["Body"].read(), got["Metadata"]) == (BODY, {"m": "2"})

    def test_a_copy_onto_itself_that_changes_nothing_is_refused(self, s3: Any, bucket: str) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=BODY)

        with pytest.raises(ClientError) as error:
            s3.copy_object(Bucket=bucket, Key="a", CopySource=f"{bucket}/a")

        assert refusal(error) == (400, "InvalidRequest")

    def test_a_copy_of_nothing_is_refused(self, s3: Any, bucket: str) -> None:
        with pytest.raises(ClientError) as error:
            s3.copy_object(Bucket=bucket, Key="a", CopySource=f"{bucket}/not there")

        assert refusal(error) == (404, "NoSuchKey")

    # On the wire

    def test_signed_chunks_are_put_together(self, endpoint: Endpoint, bucket: str) -> None:
        headers, body = signed_chunks(endpoint, f"/{bucket}/a", [b"x" * 65536, b"y" * 1000])

        answer = ask(endpoint, "PUT", f"/{bucket}/a", headers, body)

        assert answer.status == 200
        got = ask_signed(endpoint, "GET", f"/{bucket}/a")
        assert got.body == b"x" * 65536 + b"y" * 1000

    def test_a_chunk_changed_on_its_way_is_refused(self, endpoint: Endpoint, bucket: str) -> None:
        headers, body = signed_chunks(endpoint, f"/{bucket}/a", [b"x" * 65536, b"y" * 1000])

        answer = ask(endpoint, "PUT", f"/{bucket}/a", headers, body.replace(b"yyy", b"yzy", 1))

        assert answer.status in (400, 403)
        assert ask_signed(endpoint, "HEAD", f"/{bucket}/a").status == 404

    def test_a_client_that_waits_is_told_to_continue(self, endpoint: Endpoint, bucket: str) -> None:
        headers = sign(endpoint, "PUT", f"/{bucket}/a", {"Expect": "100-continue"}, b"12345")
        with connect(endpoint) as connection:
            connection.sendall(head("PUT", f"/{bucket}/a", endpoint, headers, 5))
            interim = connection.recv(4096)
            connection.sendall(b"12345")
            final = connection.recv(4096)

        assert interim.startswith(b"HTTP/1.1 100")
        assert final.startswith(b"HTTP/1.1 200")

    def test_requests_sent_at_once_are_answered_in_order(
        self, s3: Any, endpoint: Endpoint, bucket: str
    ) -> None:
        keys = [f"k{number}" for number in range(5)]
        for key in keys:
            s3.put_object(Bucket=bucket, Key=key, Body=f"<{key}>".encode())
        sent = b"".join(
            head("GET", f"/{bucket}/{key}", endpoint, sign(endpoint, "GET", f"/{bucket}/{key}"))
            for key in keys
        )
        with connect(endpoint) as connection:
            connection.sendall(sent)
            received = b""
            while b"<k4>" not in received:
                data = connection.recv(65536)
                assert data, received
                received += data

        places = [received.index(f"<{key}>".encode()) for key in keys]
        assert places == sorted(places)

    def test_a_request_may_come_byte_by_byte(
        self, s3: Any, endpoint: Endpoint, bucket: str
    ) -> None:
        target = f"/{bucket}/a"
        sent = head("PUT", target, endpoint, sign(endpoint, "PUT", target, body=b"12345"), 5)
        with connect(endpoint) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in sent + b"12345":
                connection.sendall(bytes([byte]))
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")

        assert s3.get_object(Bucket=bucket, Key="a")["Body"].read() == b"12345"

    def test_a_connection_is_closed_when_the_client_asks(
        self, s3: Any, endpoint: Endpoint, bucket: str
    ) -> None:
        s3.put_object(Bucket=bucket, Key="a", Body=b"x")
        headers = sign(endpoint, "GET", f"/{bucket}/a") | {"Connection": "close"}
        with connect(endpoint) as connection:
            connection.sendall(head("GET", f"/{bucket}/a", endpoint, headers))
            received = b"".join(iter(lambda: connection.recv(4096), b""))

        assert received.endswith(b"\r\n\r\nx")

    def test_a_method_that_makes_no_sense_is_refused(self, endpoint: Endpoint, bucket: str) -> None:
        answer = ask_signed(endpoint, "POST", f"/{bucket}/a")

        assert answer.status in (400, 405, 412)
        assert answer.code


def connect(endpoint: Endpoint) -> socket.socket:
    """Open a connection without a client on it."""
    parts = urllib.parse.urlsplit(endpoint.url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=20)


def head(
    method: str, target: str, endpoint: Endpoint, headers: dict[str, str], num_body_bytes: int = 0
) -> bytes:
    """Write a request's head."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {urllib.parse.urlsplit(endpoint.url).netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if num_body_bytes:
        lines.append(f"Content-Length: {num_body_bytes}")
    return "\r\n".join([*lines, "", ""]).encode()


def signed_chunks(
    endpoint: Endpoint, target: str, chunks: list[bytes]
) -> tuple[dict[str, str], bytes]:
    """Give headers and body of a PUT whose chunks are signed one by one.

    Written from the description in Amazon's reference, apart from the server's own code.
    """
    headers = sign(
        endpoint,
        "PUT",
        target,
        {
            "Content-Encoding": "aws-chunked",
            "x-amz-decoded-content-length": str(sum(map(len, chunks))),
        },
        content_sha256="STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
    )
    amz_date = headers["X-Amz-Date"]
    scope = f"{amz_date[:8]}/{endpoint.region}/s3/aws4_request"
    key = f"AWS4{endpoint.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    previous = headers["Authorization"].rpartition("=")[2]
    body = b""
    empty = hashlib.sha256().hexdigest()
    for chunk in itertools.chain(chunks, [b""]):
        digest = hashlib.sha256(chunk).hexdigest()
        text = "\n".join(["AWS4-HMAC-SHA256-PAYLOAD", amz_date, scope, previous, empty, digest])
        previous = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
        body += f"{len(chunk):x};chunk-signature={previous}\r\n".encode() + chunk + b"\r\n"
    return headers, body


def presign(endpoint: Endpoint, target: str, *, age_s: int, expires_s: int) -> str:
    """Presign a GET as of some time ago, which botocore does not."""
    then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
    amz_date = then.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{amz_date[:8]}/{endpoint.region}/s3/aws4_request"
    query = urllib.parse.urlencode(
        {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{endpoint.access_key}/{scope}",
            "X-Amz-Date": amz_date,
            "X-Amz-Expires": str(expires_s),
            "X-Amz-SignedHeaders": "host",
        }
    )
    host = urllib.parse.urlsplit(endpoint.url).netloc
    request = "\n".join(["GET", target, query, f"host:{host}", "", "host", "UNSIGNED-PAYLOAD"])
    digest = hashlib.sha256(request.encode()).hexdigest()
    key = f"AWS4{endpoint.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    text = "\n".join(["AWS4-HMAC-SHA256", amz_date, scope, digest])
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    return f"{target}?{query}&X-Amz-Signature={signature}"
