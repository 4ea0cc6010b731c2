"""Every error of the library.

```text
LoaderError
├── CredentialsError (ValueError)           the credentials file cannot be used
├── StoreError
│   ├── KeyNotFoundError (FileNotFoundError)    no such object, or no such bucket
│   │   ├── MissingIndexError                       shards without an index of byte ranges
│   │   └── MissingSplitError                       data, but not of the split asked for
│   ├── AccessDeniedError (PermissionError)     wrong key, wrong secret, no right
│   │   └── ExpiredCredentialsError                 credentials that were not renewed in time
│   ├── ByteRangeError (ValueError)             the object ends before the range does
│   └── StoreUnavailableError (ConnectionError) it failed in each allowed attempt
│       ├── DeadlineError (TimeoutError)            no answer in the time that was allowed
│       ├── BodyMismatchError                       a body that is short, empty or another object's
│       └── ThrottledError                          the store takes fewer requests than were made
├── IndexFormatError (ValueError)           an index file that is not one
├── ShardFormatError (ValueError)           a shard that is not what its format says
│   └── ChecksumError                           bytes of it that are not those that were written
├── ClassesFormatError (ValueError)         a classes file that is not one
├── UnknownClassError (LookupError)         a sample whose class the classes file does not hold
├── SampleDecodeError (ValueError)          bytes that are no image
├── ErrorBudgetError (RuntimeError)         more samples failed than on_error may pass over
├── MissingDependencyError (ImportError)    an optional package is not installed
└── UnsupportedTorchError (RuntimeError)    a torch whose loader works in a way that we do not know
```

Each also is the built-in that a caller would expect. Each can be built from one string, and none
has an attribute named ``message``: torch rebuilds a worker's error in the parent like that, and
anything else arrives there as a bare ``RuntimeError``.
"""


class LoaderError(Exception):
    """Anything that this library raises, but for the ``ValueError`` of a wrong argument."""


class CredentialsError(LoaderError, ValueError):
    """A credentials file that is malformed, incomplete, or holds a key that is not known."""


class StoreError(LoaderError):
    """A store could not do what it was asked to."""


class KeyNotFoundError(StoreError, FileNotFoundError):
    """There is no such object, or no such bucket."""


class MissingIndexError(KeyNotFoundError):
    """Shards lie there, but no index of their byte ranges; they can be read front to back."""

    location: str = ""
    """Where they lie, as `StreamedShards` takes it."""


class MissingSplitError(KeyNotFoundError):
    """Data lie there, but none of the split that was asked for."""

    splits: tuple[str, ...] = ()
    """Those that there are; none where the data are not parted."""


class AccessDeniedError(StoreError, PermissionError):
    """The store knows who asks, or not, and says no."""


class ExpiredCredentialsError(AccessDeniedError):
    """The session token has run out, and there was no new one."""


class ByteRangeError(StoreError, ValueError):
    """The object ends before the byte range that was asked for."""


class StoreUnavailableError(StoreError, ConnectionError):
    """The store failed in each allowed attempt."""

    retry_after_s: float = 0.0
    """Seconds that the store asked to be left alone; 0 if it did not say."""


class DeadlineError(StoreUnavailableError, TimeoutError):
    """The store gave no whole answer in the time that was allowed."""


class BodyMismatchError(StoreUnavailableError):
    """A body that is not the object: cut short, empty, or of another object."""


class ThrottledError(StoreUnavailableError):
    """The store refuses a request for being one too many, such as S3's 503 SlowDown."""


class IndexFormatError(LoaderError, ValueError):
    """A file that was to be an index is none."""


class ShardFormatError(LoaderError, ValueError):
    """A shard, or a record in it, that is not what its format says."""


class ChecksumError(ShardFormatError):
    """Bytes of a shard that are not those that were written, by their checksum."""


class ClassesFormatError(LoaderError, ValueError):
    """A file that was to map classes is none."""


class UnknownClassError(LoaderError, LookupError):
    """A sample belongs to a class that the classes file does not hold."""


class SampleDecodeError(LoaderError, ValueError):
    """The bytes of a sample are not what its format says."""


class ErrorBudgetError(LoaderError, RuntimeError):
    """More samples of an epoch failed than its ``error_budget`` allows."""


class MissingDependencyError(LoaderError, ImportError):
    """An optional package is needed and not installed."""


class UnsupportedTorchError(LoaderError, RuntimeError):
    """The installed torch has a data loader that this release does not know."""
