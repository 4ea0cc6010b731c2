"""Credentials as AWS's own tools find them, looked up once for a process and its workers.

```text
parent   resolve -> walks the chain -> the metadata service          once, and again before they end
   |     prepare_for_workers                                         the same, before workers start
   v     fork, or a pickle while a process is spawned
worker   resolve -> what the parent found, until shortly before its end -> walks the chain itself
```

Only credentials that end are handed on: those of instance and container roles, of assumed roles, of
commands. The others lie in the environment and in files, where a worker finds them as well.
"""

from __future__ import annotations

import logging
import math
import multiprocessing.context
import random
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from typing_extensions import override

from concurrent_dataloader.errors import (
    CredentialsError,
    ExpiredCredentialsError,
    MissingDependencyError,
)
from concurrent_dataloader.stores.base import PerProcess, ValueObject
from concurrent_dataloader.stores.credentials import Credentials

log = logging.getLogger(__name__)

_LONGEST_S = 7 * 24 * 3600.0


class CredentialsChain(ValueObject):
    """Credentials as AWS's own tools find them; looked up at first use, and handed to workers.

    A process that is started while credentials are known which end gets these, and looks for its
    own shortly before that.
    """

    def __init__(self, profile: str | None = None) -> None:
        self.profile = profile
        self._latest = _Latest()
        self._is_in_vain = False
        self._found = PerProcess(
            partial(_Found, partial(_walk_chain, profile), self._latest, random.Random), _forget
        )
        _living[id(self)] = self

    @override
    def _arguments(self) -> tuple[str | None]:
        return (self.profile,)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the profile; with what was found only while a process is spawned."""
        known = self._latest.known
        if known is None or multiprocessing.context.get_spawning_popen() is None:
            return super().__reduce__()
        return _make_knowing, (self.profile, known)

    def resolve(self) -> Credentials:
        """Give the credentials of this moment; refreshes those that are about to expire.

        Raises:
            CredentialsError: There are none.
            ExpiredCredentialsError: They have run out, and no new ones could be had.
        """
        return self._found.get().resolve()

    @property
    def is_due(self) -> bool:
        """Whether `resolve` will ask for new ones, and so wait for whoever gives them."""
        return self._found.get().is_due

    def prepare_for_workers(self) -> None:
        """Look for credentials, so that each worker need not; a failure is left to them to tell."""
        if self._is_in_vain:
            return
        try:
            self.resolve()
        except (CredentialsError, MissingDependencyError) as error:
            self._is_in_vain = self._latest.known is None
            log.debug("credentials: none for workers (%s)", error)


def prepare_for_workers() -> None:
    """Have all chains of this process know credentials that workers can be given."""
    for reference in _living.valuerefs():
        chain = reference()
        if chain is not None:
            chain.prepare_for_workers()


_living: weakref.WeakValueDictionary[int, CredentialsChain] = weakref.WeakValueDictionary()


class Lasting(NamedTuple):
    """Credentials, and how long."""

    credentials: Credentials
    end_s: float
    """When they end, in seconds of the system's clock since 1970; infinite for never."""

    method: str
    """What gave them, as botocore calls it."""


class _Latest:
    """What this process found last that ends; inherited by those that are forked."""

    def __init__(self, known: Lasting | None = None) -> None:
        self.known = known


def _make_knowing(profile: str | None, known: Lasting) -> CredentialsChain:
    chain = CredentialsChain(profile)
    chain._latest.known = known
    return chain


def _forget(value: object) -> None:
    del value


class _Found:
    """What one process found, or was told by the one that started it.

    botocore asks for new ones from 15 minutes before the end on, and waits for them from 10 on. All
    workers of a job have the same ones, and would ask for the next at the same second; each draws a
    moment between the two instead.

    A renewal that fails costs nothing while the credentials before are valid: these are used on,
    and new ones asked for once more after some seconds.
    """

    _EARLIEST_S = 15 * 60.0
    _LATEST_S = 10 * 60.0
    _ASKED_EVERY_S = 15.0

    def __init__(
        self,
        walk: Callable[[], Any],
        latest: _Latest,
        make_rng: Callable[[], random.Random],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._walk = walk
        self._latest = latest
        self._clock = clock
        self._renewed_before_end_s = make_rng().uniform(self._LATEST_S, self._EARLIEST_S)
        # Touched by many threads without a lock: at worst two of them ask.
        self._asked_again_s = -math.inf
        self._provider: Any = None
        self._walking = threading.Lock()
        known = latest.known
        is_over = known is None or known.end_s <= clock()
        self._now: Lasting = self._ask_first() if known is None or is_over else known

    @property
    def is_due(self) -> bool:
        """Whether new credentials are to be asked for."""
        left_s = self._now.end_s - self._clock()
        if left_s > self._renewed_before_end_s:
            return False
        return left_s <= 0 or time.monotonic() >= self._asked_again_s

    def resolve(self) -> Credentials:
        """Give the credentials of this moment."""
        if not self.is_due:
            return self._now.credentials
        self._asked_again_s = time.monotonic() + self._ASKED_EVERY_S
        try:
            self._now = self._ask()
        except (CredentialsError, *_failures()) as error:
            reason = " ".join(str(error).split())
            if self._now.end_s <= self._clock():
                raise ExpiredCredentialsError(
                    f"credentials: those of the standard AWS chain ({self._now.method}) have "
                    f"expired and could not be renewed ({reason}), expected new ones; check what "
                    "gives them, or give a credentials file that is replaced in time"
                ) from error
            log.warning("credentials: not renewed (%s); those before are used on", reason)
        return self._now.credentials

    def _ask_first(self) -> Lasting:
        try:
            return self._ask()
        except (CredentialsError, MissingDependencyError):
            raise
        except _failures() as error:
            raise CredentialsError(
                f"credentials: the standard AWS chain failed ({error}), expected credentials; "
                "mend it, give a credentials file, or, for a public bucket, anonymous=True "
                "(--anonymous of commands)"
            ) from error

    def _ask(self) -> Lasting:
        """Ask whoever gives credentials, whom a process that was told some looks for only now."""
        with self._walking:
            if self._provider is None:
                self._provider = self._walk()
        frozen = self._provider.get_frozen_credentials()
        end_s = self._clock() + _seconds_left(self._provider)
        credentials = Credentials(frozen.access_key, frozen.secret_key, frozen.token)
        lasting = Lasting(credentials, end_s, self._provider.method)
        self._latest.known = lasting if end_s < math.inf else None
        return lasting


def _seconds_left(provider: Any) -> float:
    """Find how long credentials last, to the second; all that botocore tells is whether they do.

    Those that last for a week or longer count as such that do not end.
    """
    refresh_needed = getattr(provider, "refresh_needed", None)
    # Those of the environment or a profile never end, and have no such question.
    if refresh_needed is None or not refresh_needed(_LONGEST_S):
        return math.inf
    least_s, most_s = 0.0, _LONGEST_S
    while most_s - least_s > 1:
        middle_s = (least_s + most_s) / 2
        least_s, most_s = (least_s, middle_s) if refresh_needed(middle_s) else (middle_s, most_s)
    return least_s


def _failures() -> tuple[type[Exception], ...]:
    """Give what botocore raises where there are no credentials to be had."""
    import botocore.exceptions

    # RuntimeError: new ones that have expired, too.
    return botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, RuntimeError


def _walk_chain(profile: str | None) -> Any:
    # Imported here: it takes a quarter of a second, and only this source needs it.
    try:
        import botocore.session
    except ImportError as error:
        raise MissingDependencyError(
            f"credentials: {error}; the standard AWS chain needs botocore, install it with "
            "`pip install boto3`, or give a credentials file"
        ) from error
    provider = botocore.session.Session(profile=profile).get_credentials()
    if provider is None:
        raise CredentialsError(
            "credentials: the standard AWS chain (environment, profile, instance role) has none, "
            "expected some; give a credentials file, or, for a public bucket, anonymous=True "
            "(--anonymous of commands)"
        )
    return provider
