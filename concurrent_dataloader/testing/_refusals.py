"""What S3 says when it refuses: codes, statuses, words."""

from __future__ import annotations

# Source: "Error responses", Amazon S3 API reference.
_STATUS_AND_WORDS: dict[str, tuple[int, str]] = {
    "AccessDenied": (403, "Access Denied"),
    "AuthorizationHeaderMalformed": (400, "The authorization header is malformed."),
    "BadDigest": (400, "The digest you specified did not match what was received."),
    "BucketAlreadyOwnedByYou": (409, "The bucket is already yours."),
    "BucketNotEmpty": (409, "The bucket you tried to delete is not empty."),
    "EntityTooSmall": (400, "A part other than the last is smaller than 5 MiB."),
    "ExpiredToken": (400, "The provided token has expired."),
    "IncompleteBody": (400, "The body has another length than was announced."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "InvalidAccessKeyId": (403, "The access key Id you provided does not exist."),
    "InvalidArgument": (400, "An argument is invalid."),
    "InvalidBucketName": (400, "The specified bucket is not valid."),
    "InvalidDigest": (400, "The Content-MD5 you specified is not valid."),
    "InvalidPart": (400, "A part could not be found, or its ETag is another one."),
    "InvalidPartOrder": (400, "The list of parts was not in ascending order."),
    "InvalidRange": (416, "The requested range is not satisfiable."),
    "InvalidRequest": (400, "The request is invalid."),
    "InvalidToken": (400, "The provided token is malformed or otherwise invalid."),
    "KeyTooLongError": (400, "Your key is too long."),
    "MalformedXML": (400, "The XML you provided was not well-formed or did not validate."),
    "MethodNotAllowed": (405, "The specified method is not allowed against this resource."),
    "MissingContentLength": (411, "You must provide the Content-Length HTTP header."),
    "NoSuchBucket": (404, "The specified bucket does not exist."),
    "NoSuchKey": (404, "The specified key does not exist."),
    "NoSuchUpload": (404, "The specified multipart upload does not exist."),
    "NotImplemented": (501, "A header or a query you provided implies what is not implemented."),
    "PreconditionFailed": (412, "At least one of the preconditions you specified did not hold."),
    "RequestTimeTooSkewed": (403, "The request time and the server's time differ too much."),
    "ServiceUnavailable": (503, "Service is unable to handle request."),
    "SignatureDoesNotMatch": (
        403,
        "The request signature we calculated does not match the signature you provided.",
    ),
    "SlowDown": (503, "Please reduce your request rate."),
    "XAmzContentSHA256Mismatch": (
        400,
        "The provided 'x-amz-content-sha256' header does not match what was computed.",
    ),
}


class S3Error(Exception):
    """An answer that is one of S3's errors.

    Args:
        code: One of S3's codes.
        words: What to say in place of the usual words.
    """

    def __init__(self, code: str, words: str = "") -> None:
        self.status, usual = _STATUS_AND_WORDS[code]
        self.code = code
        self.words = words or usual
        super().__init__(f"{code}: {self.words}")
