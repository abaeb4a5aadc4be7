"""Storage behind fsspec: opening URLs, retrying transient failures, and explaining permanent ones.

An object store answers 503 when it is asked too often, drops connections, and is restarted. Such failures are waited
out with growing pauses; everything else becomes a ``StoreError`` that says what to set or to fix.
"""

import errno
import http.client
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlsplit

import fsspec

log = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRY_SECONDS = 300.0
"""Time for which requests that fail transiently are repeated."""
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS: Final = 15.0
PROBE_RETRY_SECONDS: Final = 3.0
"""The same for the first request of a command: a wrong address should be reported soon."""

S3_PROTOCOLS: Final = ("s3", "s3a")
_S3_ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_S3_CHECKSUMS: Final = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "request_checksum_calculation",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "response_checksum_validation",
}
_TRANSIENT_STATUS: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 509})
_TRANSIENT_CODES: Final = frozenset(
    {
        "RequestTimeout",
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "InternalError",
    }
)
_SECRET_PARAMETERS: Final = re.compile(r"(?i)signature|^sig$|token|credential|secret|password|accesskey|api_?key")
_LOCAL_CAUSES: Final = {
    errno.ENOSPC: "the disk is full: free some space (`ptafuse gc` removes what no manifest names), then run the same command",
    errno.EDQUOT: "the disk quota is used up: free some space, then run the same command",
    errno.EFBIG: "the file is larger than this process may write: raise the limit (`ulimit -f`), then run the same command",
    errno.EROFS: "the disk is mounted read-only: give a run directory that can be written",
    errno.EACCES: "permission denied: give a run directory that this user can write",
    errno.EPERM: "not permitted: give a run directory that this user can write, on a disk that has hard links",
    errno.EIO: "the disk gave an input/output error: check it, then run the same command",
}


class StoreError(OSError):
    """Error of storage that cannot be used, which is not a shard's fault. The message says what to fix."""


class StoreUnreachableError(StoreError):
    """Storage gave no useful answer for ``RETRY_SECONDS``."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """Open the fsspec filesystem of a URL or local path; also return the path in it.

    Endpoint and credentials of S3 come from the usual environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
    ``AWS_PROFILE``...). Listings are never cached: other machines write too.

    Raises:
        StoreError: the protocol is unknown, or its package is missing.
    """
    refuse_secrets(url)
    options: dict[str, Any] = {"use_listings_cache": False} if "://" in url else {}
    if url.split("://", 1)[0] in S3_PROTOCOLS:
        options |= _s3_options()
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # fsspec names the package to install, or the protocols that it knows
        raise StoreError(f"{url} cannot be opened: {error}") from error
    return filesystem, root


def refuse_secrets(url: str) -> str:
    """Return the URL unless it holds a secret: URLs are recorded in the run directory and shown.

    Raises:
        ValueError: it holds a password, or the signature or token of a signed URL.
    """
    if "://" not in url:
        return url
    split = urlsplit(url)
    if split.password or any(_SECRET_PARAMETERS.search(name) for name, _ in parse_qsl(split.query)):
        raise ValueError(
            f"{split.scheme}://...{PurePosixPath(split.path).name}: the URL holds a password, signature or token, and URLs are "
            "recorded in the run directory. Give credentials in the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for other stores see their fsspec package)"
        )
    return url


def check_reachable(filesystem: Any, root: str, url: str) -> None:
    """Check that a remote store answers, once, before anything else uses it.

    Raises:
        StoreError: no answer, no credentials, access refused, or no such bucket; says what to set.
    """
    protocol = url.split("://", 1)[0]
    if protocol not in S3_PROTOCOLS:
        retry_transient(filesystem.exists, root, url=url, seconds=PROBE_RETRY_SECONDS)
        return
    bucket = root.split("/", 1)[0]
    try:
        retry_transient(filesystem.info, bucket, url=url, seconds=PROBE_RETRY_SECONDS)
    except FileNotFoundError:
        where = _s3_endpoint()
        raise StoreError(
            f"{url}: there is no bucket {bucket!r} at {where or 'AWS'}: create it or correct the URL"
            + ("" if where else "; for a store other than AWS set AWS_ENDPOINT_URL")
        ) from None


def retry_transient(
    call: Callable[..., Result], *arguments: Any, url: str, seconds: float | None = None, **keywords: Any
) -> Result:
    """Call a function of a filesystem, and repeat the call while its failure is transient.

    Args:
        call: function to call; calling it twice must do no harm.
        *arguments: positional arguments of the call.
        url: URL of the store, for messages.
        seconds: time after which to give up; None: ``RETRY_SECONDS``.
        **keywords: keyword arguments of the call.

    Raises:
        FileNotFoundError: the call raised it; the same holds for FileExistsError.
        StoreUnreachableError: the call kept failing for that time.
        StoreError: the call failed in another way.
    """
    limit = RETRY_SECONDS if seconds is None else seconds
    started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        try:
            return call(*arguments, **keywords)
        except (FileNotFoundError, FileExistsError, StoreError):
            raise
        except Exception as error:  # every backend has its own error classes; none is swallowed
            if not is_transient(error):
                explained = _explained(error, url)
                if explained is error:
                    raise
                raise explained from error
            waited = time.monotonic() - started
            if waited + pause > limit:
                raise StoreUnreachableError(_unreachable(error, url, waited)) from error
            if pause > 1:
                log.warning("%s: %s; trying again (for %.0f s so far)", url, _brief(error), waited)
        time.sleep(pause * random.uniform(0.5, 1))  # many workers must not retry at the same moment
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def is_transient(error: BaseException) -> bool:
    """Return whether retrying the request may succeed."""
    code, status = _http_answer(error)
    if code is not None or status is not None:
        return code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS
    if isinstance(error, ConnectionError | TimeoutError | http.client.HTTPException):
        return True
    return isinstance(error, _network_errors())


def local_error(error: OSError, where: str) -> OSError:
    """Explain a failure of the local disk to the user; return other errors unchanged."""
    cause = _LOCAL_CAUSES.get(error.errno or 0)
    if isinstance(error, StoreError) or cause is None:
        return error
    return StoreError(f"{where}: {cause} ({error.strerror})")


def _s3_endpoint() -> str | None:
    return next((os.environ[name] for name in _S3_ENDPOINT_VARIABLES if os.environ.get(name)), None)


def _s3_options() -> dict[str, Any]:
    """Return S3 options: one attempt per request (``retry_transient`` repeats them), and checksums."""
    config: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "read_timeout": 60}
    endpoint = _s3_endpoint()
    if endpoint is None:
        return {"config_kwargs": config}
    config |= {option: "when_required" for name, option in _S3_CHECKSUMS.items() if name not in os.environ}
    return {"config_kwargs": config, "endpoint_url": endpoint}


def _http_answer(error: BaseException) -> tuple[str | None, int | None]:
    """Return the error code and HTTP status of a backend's exception or of its cause, if it has any."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)  # botocore.exceptions.ClientError
        if isinstance(response, dict):
            return response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        status = next((getattr(candidate, name, None) for name in ("status", "status_code", "code")), None)
        if isinstance(status, int):
            return None, status
    return None, None


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return the network errors of s3fs' and other backends' HTTP clients that are not Python's own classes."""
    import aiohttp
    from botocore import exceptions, parsers

    return (
        aiohttp.ClientError,
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        parsers.ResponseParserError,
    )


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _unreachable(error: BaseException, url: str, waited: float) -> str:
    endpoint = _s3_endpoint() if url.split("://", 1)[0] in S3_PROTOCOLS else None
    if endpoint:
        advice = f"check that {endpoint} (AWS_ENDPOINT_URL) is right and running"
    else:
        advice = "check the network; for a store other than AWS set AWS_ENDPOINT_URL"
    return (
        f"{url}: no useful answer for {waited:.0f} s ({_brief(error)}): {advice}, then run the same command again: "
        "finished shards are kept"
    )


def _explained(error: Exception, url: str) -> Exception:
    """Explain a permanent failure of a backend to the user."""
    if "://" not in url:
        return local_error(error, url) if isinstance(error, OSError) else error
    if isinstance(error, PermissionError):
        code, _ = _http_answer(error)
        return StoreError(
            f"{url}: access refused ({code or error}): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
            "and that this identity may list the bucket and get, put and delete its objects"
        )
    from botocore import exceptions

    missing = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError)
    if isinstance(error, missing):
        return StoreError(
            f"{url}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every machine "
            f"of the run ({error})"
        )
    if isinstance(error, OSError | exceptions.BotoCoreError):
        return StoreError(f"{url}: {_brief(error)}")
    return error
