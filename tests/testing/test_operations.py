"""S3's answers as Amazon's reference has them, where other servers differ or are behind."""

from __future__ import annotations

import base64
import hashlib
import socket
import urllib.parse
import zlib
from typing import Any

import pytest
from botocore.exceptions import ClientError

from concurrent_dataloader.testing import ObjectServer
from concurrent_dataloader.testing._objects import compute_checksum
from tests.testing.s3_conformance import PART, make_client, refusal, signed_chunks
from tests.testing.s3_raw import Endpoint, ask, ask_signed, endpoint_of, sign


@pytest.fixture
def endpoint(object_server: ObjectServer) -> Endpoint:
    object_server.create_bucket("bucket")
    return endpoint_of(object_server)


@pytest.fixture
def s3(endpoint: Endpoint) -> Any:
    client = make_client(endpoint)
    yield client
    client.close()


def test_a_bucket_of_the_first_region_has_no_location(s3: Any) -> None:
    assert s3.get_bucket_location(Bucket="bucket")["LocationConstraint"] is None


def test_a_bucket_of_another_region_has_one(make_object_server: Any) -> None:
    server = make_object_server(region="eu-central-1")
    client = make_client(endpoint_of(server))
    client.create_bucket(
        Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
    )

    location = client.get_bucket_location(Bucket="bucket")["LocationConstraint"]
    with pytest.raises(ClientError) as error:
        client.create_bucket(
            Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
        )

    assert location == "eu-central-1"
    assert refusal(error) == (409, "BucketAlreadyOwnedByYou")
    client.close()


def test_a_signature_for_another_region_is_refused(endpoint: Endpoint) -> None:
    answer = ask_signed(endpoint._replace(region="eu-central-1"), "GET", "/bucket")

    assert (answer.status, answer.code) == (400, "AuthorizationHeaderMalformed")
    assert b"expecting 'us-east-1'" in answer.body


def test_parts_out_of_order_are_refused(s3: Any) -> None:
    started = s3.create_multipart_upload(Bucket="bucket", Key="a")
    upload = {"Bucket": "bucket", "Key": "a", "UploadId": started["UploadId"]}
    etags = [s3.upload_part(**upload, PartNumber=n, Body=PART)["ETag"] for n in (1, 2)]
    parts = [{"PartNumber": 2, "ETag": etags[1]}, {"PartNumber": 1, "ETag": etags[0]}]

    with pytest.raises(ClientError) as error:
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

    assert refusal(error) == (400, "InvalidPartOrder")


def test_a_part_of_no_upload_is_refused(s3: Any) -> None:
    with pytest.raises(ClientError) as error:
        s3.upload_part(Bucket="bucket", Key="a", UploadId="none", PartNumber=1, Body=b"x")

    assert refusal(error) == (404, "NoSuchUpload")


def begin_uploads(s3: Any, *keys: str) -> list[tuple[str, str]]:
    """Begin an upload of each key; gives keys and upload ids in the order of a listing."""
    begun = [
        (key, s3.create_multipart_upload(Bucket="bucket", Key=key)["UploadId"]) for key in keys
    ]
    return sorted(begun, key=lambda upload: upload[0])


def uploads_of(page: dict[str, Any]) -> list[tuple[str, str]]:
    return [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", [])]


def test_uploads_of_one_key_are_listed_as_they_began(s3: Any) -> None:
    begun = begin_uploads(s3, "b", "a", "b", "b", "a", "b")

    assert uploads_of(s3.list_multipart_uploads(Bucket="bucket")) == begun


def test_a_listing_of_uploads_goes_on_behind_a_key_or_one_of_its_uploads(s3: Any) -> None:
    begun = begin_uploads(s3, "a", "b", "b", "c")
    first, second = (upload_id for key, upload_id in begun if key == "b")

    def after(**markers: str) -> list[tuple[str, str]]:
        return uploads_of(s3.list_multipart_uploads(Bucket="bucket", **markers))

    assert after(KeyMarker="b") == begun[3:]
    assert after(KeyMarker="b", UploadIdMarker=first) == begun[2:]
    assert after(KeyMarker="b", UploadIdMarker=second) == begun[3:]
    assert after(KeyMarker="aa", UploadIdMarker=second) == begun[1:]
    assert after(UploadIdMarker=second) == begun

    # Where a listing goes on is the same if what it had come to is gone.
    s3.abort_multipart_upload(Bucket="bucket", Key="b", UploadId=first)
    assert after(KeyMarker="b", UploadIdMarker=first) == begun[2:]


@pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
def test_uploads_below_a_delimiter_are_folded_across_pages(s3: Any, page_size: int) -> None:
    begun = begin_uploads(s3, "p/a", "p/b/1", "p/b/2", "p/b/2", "p/c", "p/d/1/x", "p/d/2", "q", "p")

    pages = list(
        s3.get_paginator("list_multipart_uploads").paginate(
            Bucket="bucket",
            Prefix="p/",
            Delimiter="/",
            PaginationConfig={"PageSize": page_size},
        )
    )

    folded = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", [])]
    assert folded == ["p/b/", "p/d/"]
    plain = [upload for page in pages for upload in uploads_of(page)]
    assert plain == [upload for upload in begun if upload[0] in ("p/a", "p/c")]
    assert len(pages) == -(-4 // page_size)
    assert pages[0]["Delimiter"] == "/"


def test_keys_of_uploads_are_quoted_as_in_urls_where_asked_for(s3: Any) -> None:
    begin_uploads(s3, "ü&/a b", "ü&/b")

    page = s3.list_multipart_uploads(
        Bucket="bucket", Prefix="ü&", KeyMarker="ü ", MaxUploads=1, EncodingType="url"
    )

    assert (page["EncodingType"], page["Prefix"]) == ("url", "%C3%BC%26")
    assert (page["KeyMarker"], page["NextKeyMarker"]) == ("%C3%BC%20", "%C3%BC%26/a%20b")
    assert [upload["Key"] for upload in page["Uploads"]] == ["%C3%BC%26/a%20b"]
    plain = s3.list_multipart_uploads(Bucket="bucket")
    assert "EncodingType" not in plain
    assert [upload["Key"] for upload in plain["Uploads"]] == ["ü&/a b", "ü&/b"]


def test_at_most_a_thousand_uploads_are_listed_at_once(s3: Any) -> None:
    begin_uploads(s3, *map(str, range(1001)))

    pages = [
        s3.list_multipart_uploads(Bucket="bucket", **more) for more in ({}, {"MaxUploads": 2000})
    ]

    for page in pages:
        assert (page["MaxUploads"], page["IsTruncated"], len(page["Uploads"])) == (1000, True, 1000)


def test_aws_chunked_is_no_coding_of_the_object(endpoint: Endpoint) -> None:
    headers, body = signed_chunks(endpoint, "/bucket/a", [b"x" * 100])

    assert ask(endpoint, "PUT", "/bucket/a", headers, body).status == 200
    assert "content-encoding" not in ask_signed(endpoint, "GET", "/bucket/a").headers


def test_a_changed_chunk_has_a_wrong_signature(endpoint: Endpoint) -> None:
    headers, body = signed_chunks(endpoint, "/bucket/a", [b"x" * 100])

    answer = ask(endpoint, "PUT", "/bucket/a", headers, body.replace(b"xxx", b"xyx", 1))

    assert (answer.status, answer.code) == (403, "SignatureDoesNotMatch")


def unsigned_chunks(endpoint: Endpoint, body: bytes, checksum: str) -> tuple[dict[str, str], bytes]:
    headers = sign(
        endpoint,
        "PUT",
        "/bucket/a",
        {
            "Content-Encoding": "aws-chunked",
            "x-amz-decoded-content-length": str(len(body)),
            "x-amz-trailer": "x-amz-checksum-crc32",
        },
        content_sha256="STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    )
    coded = b"%x\r\n%b\r\n0\r\nx-amz-checksum-crc32:%b\r\n\r\n" % (
        len(body),
        body,
        checksum.encode(),
    )
    return headers, coded


def test_unsigned_chunks_are_checked_by_their_trailer(endpoint: Endpoint) -> None:
    right = base64.b64encode(zlib.crc32(b"12345").to_bytes(4, "big")).decode()

    answer = ask(endpoint, "PUT", "/bucket/a", *unsigned_chunks(endpoint, b"12345", right))
    wrong = ask(endpoint, "PUT", "/bucket/a", *unsigned_chunks(endpoint, b"12346", right))

    assert answer.status == 200
    assert answer.headers["x-amz-checksum-crc32"] == right
    assert (wrong.status, wrong.code) == (400, "BadDigest")
    assert ask_signed(endpoint, "GET", "/bucket/a").body == b"12345"


def test_a_streaming_body_of_another_length_is_refused(endpoint: Endpoint) -> None:
    headers, body = unsigned_chunks(endpoint, b"12345", "")

    answer = ask(endpoint, "PUT", "/bucket/a", headers, body.replace(b"5\r\n12345", b"4\r\n1234"))

    assert (answer.status, answer.code) == (400, "IncompleteBody")


def test_a_body_in_http_chunks_is_taken(endpoint: Endpoint) -> None:
    headers = sign(
        endpoint,
        "PUT",
        "/bucket/a",
        {"Transfer-Encoding": "chunked", "x-amz-decoded-content-length": "5"},
        content_sha256="UNSIGNED-PAYLOAD",
    )

    answer = ask(endpoint, "PUT", "/bucket/a", headers, b"2\r\n12\r\n3\r\n345\r\n0\r\n\r\n")

    assert answer.status == 200
    assert ask_signed(endpoint, "GET", "/bucket/a").body == b"12345"


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("crc32", 0xCBF43926.to_bytes(4, "big")),
        ("crc32c", 0xE3069283.to_bytes(4, "big")),
        ("crc64nvme", 0xAE8B14860A799888.to_bytes(8, "big")),
        ("sha1", hashlib.sha1(b"123456789").digest()),
        ("sha256", hashlib.sha256(b"123456789").digest()),
    ],
)
def test_checksums_are_those_of_the_standards(algorithm: str, expected: bytes) -> None:
    assert compute_checksum(algorithm, b"123456789") == base64.b64encode(expected).decode()


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
def test_a_checksum_is_kept_and_given_to_those_who_ask(s3: Any, algorithm: str) -> None:
    put = s3.put_object(Bucket="bucket", Key="a", Body=b"12345", ChecksumAlgorithm=algorithm)
    name = f"Checksum{algorithm}"

    asked = s3.get_object(Bucket="bucket", Key="a", ChecksumMode="ENABLED")

    assert asked["Body"].read() == b"12345"
    assert asked[name] == put[name] == compute_checksum(algorithm.lower(), b"12345")
    assert name not in s3.get_object(Bucket="bucket", Key="a")
    assert name not in s3.get_object(
        Bucket="bucket", Key="a", ChecksumMode="ENABLED", Range="bytes=1-2"
    )


def test_a_wrong_checksum_is_refused(endpoint: Endpoint) -> None:
    headers = {"x-amz-checksum-crc32c": compute_checksum("crc32c", b"other")}

    answer = ask_signed(endpoint, "PUT", "/bucket/a", headers, b"12345")

    assert (answer.status, answer.code) == (400, "BadDigest")


def test_an_object_is_not_put_over_another_if_there_must_be_none(s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="a", Body=b"1", IfNoneMatch="*")

    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket="bucket", Key="a", Body=b"2", IfNoneMatch="*")

    assert refusal(error) == (412, "PreconditionFailed")
    assert s3.get_object(Bucket="bucket", Key="a")["Body"].read() == b"1"


def test_a_bucket_may_be_the_name_of_the_host(endpoint: Endpoint, s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="a/b", Body=b"12345")
    host = f"bucket.localhost:{endpoint.url.rpartition(':')[2]}"

    answer = ask_signed(endpoint, "GET", "/a/b", {"Host": host})

    assert (answer.status, answer.body) == (200, b"12345")


def test_a_range_that_makes_no_sense_is_no_range(endpoint: Endpoint, s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="a", Body=b"12345")

    for header in ("bytes=3-1", "bytes=-", "bytes=0-1,3-4", "lines=1-2", "bytes=a-b"):
        answer = ask_signed(endpoint, "GET", "/bucket/a", {"Range": header})
        assert (answer.status, answer.body) == (200, b"12345"), header


HUGE = "9" * 5000
"""More digits than ``int`` reads."""


@pytest.mark.parametrize("number", ["²", "\uff11", "-1", "1.0", "2147483648", HUGE])
@pytest.mark.parametrize(
    "target",
    [
        "/bucket?list-type=2&max-keys=",
        "/bucket?max-keys=",
        "/bucket?uploads&max-uploads=",
        "/bucket/a?uploadId={upload}&max-parts=",
        "/bucket/a?uploadId={upload}&part-number-marker=",
    ],
)
def test_a_count_that_is_none_is_refused(
    endpoint: Endpoint, s3: Any, target: str, number: str
) -> None:
    upload = s3.create_multipart_upload(Bucket="bucket", Key="a")["UploadId"]
    asked = target.format(upload=upload) + urllib.parse.quote(number)

    answer = ask_signed(endpoint, "GET", asked)

    assert (answer.status, answer.code) == (400, "InvalidArgument")


def test_a_count_may_have_zeros_in_front_and_be_the_largest(endpoint: Endpoint, s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="a", Body=b"")

    for number in ("2147483647", "0" * 4000 + "1"):
        answer = ask_signed(endpoint, "GET", f"/bucket?max-keys={number}")
        assert (answer.status, answer.body.count(b"<Key>")) == (200, 1)


@pytest.mark.parametrize("number", ["²", HUGE])
def test_a_part_whose_number_is_none_is_refused(endpoint: Endpoint, s3: Any, number: str) -> None:
    upload = s3.create_multipart_upload(Bucket="bucket", Key="a")["UploadId"]
    target = f"/bucket/a?uploadId={upload}"
    part = f"<Part><PartNumber>{number}</PartNumber><ETag>e</ETag></Part>"
    body = f"<CompleteMultipartUpload>{part}</CompleteMultipartUpload>".encode()

    done = ask_signed(endpoint, "POST", target, body=body)
    sent = ask_signed(endpoint, "PUT", f"{target}&partNumber={urllib.parse.quote(number)}")

    assert (done.status, done.code) == (400, "MalformedXML")
    assert (sent.status, sent.code) == (400, "InvalidArgument")


def test_a_range_of_huge_numbers_lies_behind_the_end(endpoint: Endpoint, s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="a", Body=b"12345")

    behind = ask_signed(endpoint, "GET", "/bucket/a", {"Range": f"bytes={HUGE}-"})
    up_to = ask_signed(endpoint, "GET", "/bucket/a", {"Range": f"bytes=3-{HUGE}"})
    last = ask_signed(endpoint, "GET", "/bucket/a", {"Range": f"bytes=-{HUGE}"})

    assert (behind.status, behind.code) == (416, "InvalidRange")
    assert (up_to.status, up_to.body) == (206, b"45")
    assert last.body == b"12345"


def test_a_key_of_more_than_1024_bytes_is_refused(endpoint: Endpoint) -> None:
    assert ask_signed(endpoint, "PUT", f"/bucket/{'k' * 1024}", body=b"x").status == 200
    answer = ask_signed(endpoint, "PUT", f"/bucket/{'k' * 1025}", body=b"x")

    assert (answer.status, answer.code) == (400, "KeyTooLongError")


@pytest.mark.parametrize("body", [b"", b"<Delete>", b'<!DOCTYPE a [<!ENTITY b "c">]><a/>', b"<a/>"])
def test_what_is_no_xml_of_s3_is_refused(endpoint: Endpoint, body: bytes) -> None:
    answer = ask_signed(endpoint, "POST", "/bucket?delete", body=body)

    assert (answer.status, answer.code) == (400, "MalformedXML")


def test_what_is_not_implemented_is_said_so(endpoint: Endpoint) -> None:
    answer = ask_signed(endpoint, "GET", "/bucket?policy")

    assert (answer.status, answer.code) == (501, "NotImplemented")


def test_the_second_version_of_signatures_is_refused(endpoint: Endpoint) -> None:
    target = f"/bucket/a?AWSAccessKeyId={endpoint.access_key}&Signature=c2ln&Expires=4102444800"
    header = {"Authorization": f"AWS {endpoint.access_key}:c2ln"}

    answers = [ask(endpoint, "GET", target), ask(endpoint, "GET", "/bucket/a", header)]

    assert [(answer.status, answer.code) for answer in answers] == [(400, "InvalidRequest")] * 2


def test_a_header_that_is_not_signed_is_refused(endpoint: Endpoint) -> None:
    headers = sign(endpoint, "GET", "/bucket/a") | {"x-amz-meta-a": "1"}

    answer = ask(endpoint, "GET", "/bucket/a", headers)

    assert (answer.status, answer.code) == (403, "AccessDenied")


@pytest.mark.parametrize("headers", [{"Content-Length": "many"}, {"Content-Length": HUGE}])
def test_a_malformed_request_ends_its_connection(
    endpoint: Endpoint, headers: dict[str, str]
) -> None:
    answer = ask(endpoint, "GET", "/bucket/a", headers)

    assert answer.status == 400
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("size", [b"-5", b"+5", b"0x5", b"1_0", b""])
def test_a_chunk_whose_length_is_none_ends_its_connection(endpoint: Endpoint, size: bytes) -> None:
    head = b"PUT /bucket/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = urllib.parse.urlsplit(endpoint.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + size + b"\r\n12345\r\n0\r\n\r\n")

        answer = connection.makefile("rb").read()

    assert answer.startswith(b"HTTP/1.1 400 ")


def test_a_signed_chunk_whose_length_is_none_is_refused(endpoint: Endpoint) -> None:
    """Minus six once led back to the begin of its own line, without an end."""
    headers, body = unsigned_chunks(endpoint, b"12345", "AAAAAA==")
    spoilt = body.replace(b"\r\n0\r\n", b"\r\n-6\r\n0\r\n")
    assert spoilt != body

    answer = ask(endpoint, "PUT", "/bucket/a", headers, spoilt)

    assert (answer.status, answer.code) == (400, "IncompleteBody")


def test_a_session_token_is_required_where_there_is_one(
    object_server: ObjectServer, endpoint: Endpoint
) -> None:
    object_server.add_credential("temporary", "secret", session_token="token")
    user = endpoint._replace(access_key="temporary", secret_key="secret")

    right = ask_signed(user, "GET", "/bucket", token="token")
    none = ask_signed(user, "GET", "/bucket")
    wrong = ask_signed(user, "GET", "/bucket", token="other")

    assert right.status == 200
    assert (none.status, none.code) == (400, "InvalidToken")
    assert (wrong.status, wrong.code) == (400, "InvalidToken")


def test_an_expired_token_is_refused_until_it_is_renewed(
    object_server: ObjectServer, endpoint: Endpoint
) -> None:
    object_server.add_credential("temporary", "secret", session_token="token")
    user = endpoint._replace(access_key="temporary", secret_key="secret")

    object_server.expire_session_tokens()
    expired = ask_signed(user, "GET", "/bucket", token="token")
    object_server.add_credential("temporary", "secret", session_token="token 2")
    renewed = ask_signed(user, "GET", "/bucket", token="token 2")

    assert (expired.status, expired.code) == (400, "ExpiredToken")
    assert renewed.status == 200
    assert ask_signed(endpoint, "GET", "/bucket").status == 200


def test_a_public_bucket_is_read_by_anybody_and_written_by_none(
    object_server: ObjectServer,
) -> None:
    object_server.create_bucket("open", public=True)
    object_server.put_objects("open", {"a": b"12345"})
    nobody = endpoint_of(object_server)

    assert ask(nobody, "GET", "/open/a").body == b"12345"
    assert b"<Key>a</Key>" in ask(nobody, "GET", "/open?list-type=2").body
    assert ask(nobody, "PUT", "/open/a", body=b"x").status == 403
