"""Transfers from and to object stores: which faults are transient, how often they are retried, and
how long a process that is retrying must not be reported as hung.

The private methods of Streaming's S3 client (0.13.0) are overridden here and nowhere else.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from calm_dist.data.layout import is_remote
from calm_dist.errors import DataError, UnreachableError
from calm_dist.log import NOTE
from calm_dist.recipe.sections import Data
from calm_dist.redact import MASK, redact

if TYPE_CHECKING:
    from botocore.loaders import Loader

    from calm_dist.compat.streaming import CloudDownloader

_log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_CHUNK_BYTES = 64 << 10
# Allowance between the end of a pause or an attempt and the next sign of life.
_MARGIN_SECONDS = 5.0


class MissingError(DataError):
    """The object store does not hold the object."""


class InterruptedTransferError(Exception):
    """The reader is stopping, so the transfer is not retried."""


@dataclass(frozen=True)
class Downloads:
    """Retries and time limits of transfers; the ``download_*`` fields of `recipe.sections.Data`."""

    retries: int = Data.model_fields["download_retries"].default
    timeout_seconds: float = Data.model_fields["download_timeout_seconds"].default
    limit_seconds: float = Data.model_fields["download_limit_seconds"].default

    @classmethod
    def of(cls, data: Data) -> Downloads:
        """The settings of a recipe."""
        return cls(
            data.download_retries, data.download_timeout_seconds, data.download_limit_seconds
        )


DEFAULT = Downloads()
"""The defaults, for callers without a recipe."""


class _SharedNumber(Protocol):
    """One of Streaming's shared scalars."""

    def get(self) -> Any: ...

    def set(self, value: Any) -> None: ...


class Busy:
    """How long this process, or another one of the run on its node, may still be busy with a
    transfer that is slow or retried.

    In seconds of `time.monotonic`, which is the same in all processes of a node.
    """

    def __init__(self) -> None:
        self._until = 0.0
        self._shared: _SharedNumber | None = None

    def share(self, number: _SharedNumber) -> None:
        """Exchange the time with the other processes of the node through a shared number."""
        self._shared = number

    def extend(self, seconds: float) -> None:
        """Announce that the transfer may take ``seconds`` more."""
        self._until = max(self.until(), time.monotonic() + seconds)
        if self._shared is not None:
            # Whole milliseconds in an int64. A process that is overwritten soon writes again.
            self._shared.set(int(self._until * 1000))

    def until(self) -> float:
        """The end of the announced time."""
        shared = 0.0 if self._shared is None else float(self._shared.get()) / 1000
        return max(self._until, shared)


busy = Busy()
"""This process's instance, which the watchdog reads. Forked readers share its shared number."""


class Fault(Enum):
    """The kind of a failed transfer."""

    PASSING = "may succeed when it is retried"
    CREDENTIALS = "the store refuses the credentials"
    MISSING = "the object does not exist"
    LASTING = "will fail again"


# Answers of object stores, by code or HTTP status.
_PASSING_CODES = {
    *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestThrottled"),
    *("Throttling", "ThrottlingException", "ThrottledException", "RequestThrottledException"),
    *("TooManyRequests", "TooManyRequestsException", "BandwidthLimitExceeded"),
    *("RequestLimitExceeded", "REQUEST_LIMIT_EXCEEDED", "ServerBusy", "OperationTimedOut"),
    *("PriorRequestNotComplete", "TransactionInProgressException"),
}
_CREDENTIAL_CODES = {
    *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"),
    *("InvalidToken", "InvalidSecurity", "TokenRefreshRequired", "InvalidClientTokenId"),
    *("RequestTimeTooSkewed", "AllAccessDisabled", "AccountProblem", "NotSignedUp"),
    *("UnauthorizedAccess", "InvalidPayer", "ExpiredTokenException", "AuthenticationFailed"),
}
_MISSING_CODES = {"NoSuchKey", "NoSuchBucket", "NotFound", "NOT_FOUND", "BlobNotFound"}
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529}
# Names of exceptions of Python and of the clouds' libraries, which need not be installed.
_NETWORK_TYPES = {
    *("ConnectionError", "TimeoutError", "gaierror", "timeout", "HTTPException", "EOFError"),
    *("HTTPClientError", "IncompleteReadError", "FlexibleChecksumError", "ResponseParserError"),
    *("MetadataRetrievalError", "HTTPError", "RequestException", "ChunkedEncodingError"),
    *("ServiceRequestError", "ServiceResponseError", "TransportError", "RetryError"),
    *("SSHException", "SSLError", "DataCorruption", "RetriesExceededError"),
}
_CREDENTIAL_TYPES = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "NoAuthTokenError", "TokenRetrievalError", "UnauthorizedSSOTokenError"),
    *("SSOTokenLoadError", "DefaultCredentialsError", "RefreshError", "ClientAuthenticationError"),
    *("AuthenticationException", "CredentialUnavailableError", "GatedRepoError"),
    "ConfigFileNotFound",
}


def fault_of(error: BaseException) -> Fault:
    """The kind of a failed transfer, from the answer of the store or the type of the error."""
    for cause in _chain(error):
        code, status = _answer(cause)
        names = {kind.__name__ for kind in type(cause).__mro__}
        if code in _PASSING_CODES or status in _PASSING_STATUS:
            return Fault.PASSING
        if code in _CREDENTIAL_CODES or status in (401, 403) or names & _CREDENTIAL_TYPES:
            return Fault.CREDENTIALS
        if code in _MISSING_CODES or status == 404 or isinstance(cause, FileNotFoundError):
            return Fault.MISSING
        if status is not None or "CERTIFICATE_VERIFY_FAILED" in str(cause):
            return Fault.LASTING
    if any({kind.__name__ for kind in type(c).__mro__} & _NETWORK_TYPES for c in _chain(error)):
        return Fault.PASSING
    return Fault.LASTING


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def _answer(error: BaseException) -> tuple[str, int | None]:
    """Code and HTTP status of a store's answer, as its library reports them."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        metadata = response.get("ResponseMetadata", {})
        return code, metadata.get("HTTPStatusCode") or (int(code) if code.isdigit() else None)
    code = str(getattr(error, "error_code", "") or "")
    candidates = [getattr(error, name, None) for name in ("status_code", "status", "code")]
    for value in (*candidates, getattr(response, "status_code", None)):
        with suppress(TypeError, ValueError):
            if 100 <= int(value) < 600:  # type: ignore[arg-type]
                return code, int(value)  # type: ignore[arg-type]
    return code, None


def describe(error: BaseException) -> str:
    """A short description of a failed transfer."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        code, status = _answer(error)
        message = str(response["Error"].get("Message") or "").strip()
        text = f"{status or ''} {code}".strip() + (f": {message}" if message else "")
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return redact(" ".join(text.split())[:300])


def transfer(
    attempt: Callable[[], None],
    what: str,
    downloads: Downloads,
    *,
    verb: str = "downloaded",
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Run ``attempt``, and retry it after transient faults with growing pauses.

    Args:
        what: name of the transferred object, for messages.
        stopping: returns True once the result is no longer wanted.

    Raises:
        UnreachableError: transient faults outlasted the retries.
        DataError: credentials are wrong, an object is missing (`MissingError`), or there is another
            fault that will not pass.
        InterruptedTransferError: ``stopping`` returned True.
    """
    began = time.monotonic()
    for number in itertools.count(1):
        # Time to connect and time to answer.
        busy.extend(2 * downloads.timeout_seconds + _MARGIN_SECONDS)
        try:
            return attempt()
        except Exception as error:  # each cloud has exceptions of its own
            if isinstance(error, UnreachableError | DataError):
                raise
            fault, reason = fault_of(error), describe(error)
            if fault is not Fault.PASSING:
                raise _lasting(fault, what, verb, reason) from error
            pause = pause_after(number)
            passed = time.monotonic() - began
            if number > downloads.retries or passed + pause > downloads.limit_seconds:
                limits = ""
                if verb == "downloaded":
                    limits = (
                        f" (data.download_retries={downloads.retries}, "
                        f"data.download_limit_seconds={downloads.limit_seconds:g})"
                    )
                raise UnreachableError(
                    f"{what} cannot be {verb}: {reason}; {number} attempts failed in "
                    f"{passed:.0f} s{limits}. Check the store and the network, then start the same "
                    "command again"
                ) from error
            _log.log(
                NOTE,
                f"{what.removesuffix(':')}: attempt {number} of {downloads.retries + 1} failed "
                f"({reason}); retrying in {pause:.1f} s",
            )
        _pause(pause, stopping)


def pause_after(number: int) -> float:
    """Seconds to wait after ``number`` failed attempts."""
    pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(number - 1, 10))
    # All ranks of a run meet the same fault and must not retry at the same time.
    return pause * random.uniform(0.5, 1.5)


def _pause(seconds: float, stopping: Callable[[], bool]) -> None:
    busy.extend(seconds + _MARGIN_SECONDS)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stopping():
            raise InterruptedTransferError
        time.sleep(min(left, 0.2))


def _lasting(fault: Fault, what: str, verb: str, reason: str) -> DataError:
    if fault is Fault.MISSING:
        return MissingError(
            f"{what} cannot be {verb}: it does not exist ({reason}); check the address"
        )
    if fault is Fault.CREDENTIALS:
        return DataError(
            f"{what} cannot be {verb}: the store refuses the credentials, or none are set "
            f"({reason}); on every node, set those of an account with access (for S3 "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    return DataError(f"{what} cannot be {verb} ({reason})")


def check_address(path: str) -> None:
    """Raises DataError if the password in a URL was masked, as in the recipe of a run directory."""
    if is_remote(path) and f":{MASK}@" in path:
        raise DataError(
            f"data.path: {path}: its password was masked when this was written; give "
            "data.path=… with the password"
        )


def downloader_for(remote: str) -> CloudDownloader:
    """The client that downloads from a URL: Streaming's, with single attempts for S3."""
    from calm_dist.compat.streaming import CloudDownloader

    return _s3_downloader() if remote.startswith("s3://") else CloudDownloader.get(remote)


@cache
def _service_descriptions(place: str | None) -> Loader:
    """What botocore reads of its files, and of those in the directories ``place``, to make a
    client: nearly all of the time that it takes, which each file and each attempt would take."""
    from botocore.loaders import create_loader

    return create_loader(place)


def _s3_downloader() -> CloudDownloader:
    from calm_dist.compat.streaming import S3Downloader

    class PlainS3Downloader(S3Downloader):
        """One request per attempt, which gives the store's own error code and ends when no byte
        arrives within the timeout.

        Streaming's client first asks for the size, which is refused without a code, and lets boto3
        retry everything: a stalled download of a minute takes ten.
        """

        def _create_s3_client(self, unsigned: bool = False, timeout: float = 60.0) -> Any:
            from botocore import UNSIGNED
            from botocore.config import Config
            from botocore.session import get_session

            config = Config(
                connect_timeout=timeout,
                read_timeout=timeout,
                retries={"mode": "standard", "total_max_attempts": 1},
                **({"signature_version": UNSIGNED} if unsigned else {}),
            )
            # Not shared either: a session is for one thread.
            session = get_session()
            place = session.get_config_variable("data_path")
            session.register_component("data_loader", _service_descriptions(place))
            self._s3_client = session.create_client(
                "s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL")
            )
            return self._s3_client

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            from botocore.exceptions import NoCredentialsError

            # Another thread may drop the client meanwhile.
            client = self._s3_client or self._create_s3_client(timeout=timeout)
            try:
                self._get(client, remote, local, timeout)
            except NoCredentialsError:
                # A public bucket needs no credentials.
                client = self._create_s3_client(unsigned=True, timeout=timeout)
                self._get(client, remote, local, timeout)

        def _get(self, client: Any, remote: str, local: str, timeout: float) -> None:
            url = urllib.parse.urlparse(remote)
            payer = {}
            if url.netloc in self._requester_pays_buckets:
                payer = {"RequestPayer": "requester"}
            # Nodes may share the directory.
            partial = f"{local}.{os.getpid()}.{random.getrandbits(32):08x}.tmp"
            try:
                answer = client.get_object(Bucket=url.netloc, Key=url.path.lstrip("/"), **payer)
                with open(partial, "wb") as file:
                    # iter_chunks raises if the connection ends before the last byte.
                    for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
                        file.write(chunk)
                        busy.extend(timeout + _MARGIN_SECONDS)
                os.replace(partial, local)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(partial)

    return PlainS3Downloader()
