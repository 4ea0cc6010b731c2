"""Objects of an S3-compatible store, by aiobotocore."""

from __future__ import annotations

import asyncio
import re
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import aiobotocore
import aiohttp
import botocore.exceptions
from aiobotocore.config import AioConfig
from aiobotocore.credentials import AioCredentials
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from typing_extensions import Buffer, override

from concurrent_dataloader.errors import (
    BodyMismatchError,
    DeadlineError,
    LoaderError,
    MissingDependencyError,
)
from concurrent_dataloader.ranges import ByteRange
from concurrent_dataloader.stores._aiohttp import ask_once
from concurrent_dataloader.stores._answers import broken_connection, check_body
from concurrent_dataloader.stores._boto3 import (
    client_arguments,
    client_settings,
    freeze,
    read_answer,
    shared_loader,
    translate,
)
from concurrent_dataloader.stores._checksums import Checksums
from concurrent_dataloader.stores._http import HttpStore
from concurrent_dataloader.stores.address import ClientOptions, S3Address, check_byte_range
from concurrent_dataloader.stores.base import AwaitingStore, ObjectInfo, PerLoop
from concurrent_dataloader.stores.credentials import CredentialsSource
from concurrent_dataloader.stores.credentials_chain import CredentialsChain

_OLDEST = (3, 9)


def check_version(version: str) -> None:
    """Refuse releases that take the certificate of any host for that of the store.

    They leave the comparison to aiohttp, which leaves it to the context of TLS, where botocore has
    switched it off; behind a proxy they compare nothing at all.

    Raises:
        MissingDependencyError: It is older than 3.9.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)  # 3.9.0, 3.9rc1
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        raise MissingDependencyError(
            f"client 'aiobotocore': got aiobotocore {version}, which takes the certificates of "
            "other hosts for those of the store, expected 3.9 or later; install it with "
            "`pip install 'aiobotocore>=3.9'`, or use another client"
        )


check_version(aiobotocore.__version__)


class AiobotocoreStore(AwaitingStore):
    """One aiobotocore client for each event loop."""

    def __init__(self, address: S3Address, options: ClientOptions) -> None:
        super().__init__()
        self._address = address
        self._options = options
        self._plain = HttpStore(address, options)
        self._checksums = Checksums(options.verify)
        self._clients = PerLoop(partial(_open_client, address, options))

    @override
    def _arguments(self) -> tuple[S3Address, ClientOptions]:
        return self._address, self._options

    def describe(self, key: str) -> str:
        """Name the object for a person."""
        return self._address.describe(key)

    def head(self, key: str) -> ObjectInfo:
        """Ask for an object's size; blocks, so by the standard library's client."""
        return self._plain.head(key)

    @override
    def close(self) -> None:
        """Give back what this process has opened, but for the clients of event loops of others."""
        super().close()
        self._plain.close()

    @override
    async def get_async(self, key: str, byte_range: ByteRange | None = None) -> Buffer:
        """Read as `Store.get_async` says."""
        extra: dict[str, str] = {}
        if byte_range is not None:
            if check_byte_range(byte_range) == 0:
                return b""
            extra["Range"] = f"bytes={byte_range.start}-{byte_range.stop - 1}"
        elif self._options.verify == "checksum":
            extra["ChecksumMode"] = "ENABLED"
        object_key = self._address.object_key(key)
        client = await self._clients.get()
        where, endpoint = self.describe(key), self._address.endpoint_url
        try:
            answer = await client.get_object(Bucket=self._address.bucket, Key=object_key, **extra)
            async with answer["Body"] as stream:
                body: bytes = await stream.read()
        except LoaderError:  # of the credentials; it may be an OSError, too
            raise
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise translate(self._address, key, error) from error
        except TimeoutError as error:
            raise DeadlineError(f"{where}: no answer from {endpoint} in time") from error
        except aiohttp.ClientPayloadError as error:
            raise BodyMismatchError(
                f"{where}: the body from {endpoint} was cut short: {error}"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise broken_connection(self._address, key, str(error)) from error
        status, header = read_answer(answer)
        return check_body(self._address, key, byte_range, status, header, body, self._checksums)


class _AskingOnce:
    """A session of aiohttp's, as aiobotocore uses one, that leaves repeating to us."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **arguments: Any) -> aiohttp.ClientResponse:
        """Make a request as `aiohttp.ClientSession.request` does, once."""
        return await self._session.request(method, middlewares=(ask_once,), **arguments)


class _HttpSession(AIOHTTPSession):
    """aiobotocore's own, which makes its sessions itself and takes no middlewares for them."""

    @override
    async def _get_session(self, proxy_url: str | None) -> Any:
        return _AskingOnce(await super()._get_session(proxy_url))


class _LiveCredentials(AioCredentials):
    """Asks a source of ours for each request, so that new credentials are used at once."""

    def __init__(self, source: CredentialsSource) -> None:
        now = source.resolve()
        super().__init__(now.access_key_id, now.secret_access_key, now.session_token)
        self._source = source

    @override
    async def get_frozen_credentials(self) -> Any:
        """Give the credentials of this moment."""
        source = self._source
        if isinstance(source, CredentialsChain) and source.is_due:
            return await asyncio.to_thread(freeze, source)
        return freeze(source)


class _Provider:
    """What aiobotocore asks for credentials in place of its own chain."""

    def __init__(self, source: CredentialsSource) -> None:
        self._source = source

    async def load_credentials(self) -> _LiveCredentials:
        """Give what asks the source."""
        return _LiveCredentials(self._source)


def _open_client(address: S3Address, options: ClientOptions) -> AbstractAsyncContextManager[Any]:
    arguments = client_arguments(address, options)
    arguments["config"] = AioConfig(
        http_session_cls=_HttpSession, **client_settings(address, options)
    )
    source = address.credentials
    if source is not None:
        source.resolve()  # says in our words that there are none
    profile = source.profile if isinstance(source, CredentialsChain) else None
    session = AioSession(profile=profile)
    if source is not None:
        session.register_component("credential_provider", _Provider(source))
    session.register_component("data_loader", shared_loader())
    return session.create_client(**arguments)
