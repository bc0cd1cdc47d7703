"""Files from the network: whole and checked, or not there at all.

A download goes to `<file>.part`, is checked against the digest that the caller knows beforehand,
and only then takes its name, in one step. What an interrupted download has fetched is kept and
continued. Standard library only.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import urlsplit

try:
    import fcntl
except ImportError:  # Windows: two processes that download the same file at once are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["download_file", "require_digest", "sha256_of", "writing"]

CHUNK = 1 << 16


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def require_digest(path: Path, sha256: str) -> None:
    """Refuses a file whose content is not the expected.

    Args:
        path: The file.
        sha256: Its digest, in hexadecimal.

    Raises:
        ValueError: Naming the file and both digests. The file is left as it is.
    """
    found = sha256_of(path)
    if found != sha256.lower():
        raise ValueError(
            f"{path} holds other content than expected: its sha256 is {found}, expected "
            f"{sha256.lower()}. It was left as it is. Usual cause: a copy that was cut off, or "
            "another version. Move it away and fetch it anew."
        )


def download_file(url: str, path: Path | str, *, sha256: str, timeout: float = 30.0) -> Path:
    """Fetches a file, continues an interrupted download, and checks it before it takes its name.

    Example::

        download_file("https://example.org/data.npy", "data/data.npy", sha256="9f86d0...")

    Args:
        url: Where it is, http or https.
        path: What it shall be called. Where it is there already, nothing is fetched.
        sha256: Digest that its content must have, in hexadecimal.
        timeout: Seconds without a byte after which the download is given up.

    Returns:
        The path.

    Raises:
        ConnectionError: If it cannot be fetched, or not to its end; what came is kept for the next
            attempt. The message names the url, the folder, and what to put there by hand.
        ValueError: If the content is not the expected, fetched or already there.
        OSError: If it cannot be written, as on a full disk; nothing takes the file's name.
    """
    path = Path(path)
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} is not an address that begins with http:// or https://.")
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        if path.exists():  # from before, or because another process was faster
            require_digest(path, sha256)
            return path
        if not part.exists() or sha256_of(part) != sha256.lower():
            continued = _fetch(url, part, path, sha256, timeout)
            if continued and sha256_of(part) != sha256.lower():
                # The beginning may be from another version of the file than the end.
                part.unlink()
                _fetch(url, part, path, sha256, timeout)
        if (found := sha256_of(part)) != sha256.lower():
            part.unlink()
            raise ValueError(
                f"{url} gave other content than expected: its sha256 is {found}, expected "
                f"{sha256.lower()}. It was discarded. Usual cause: a page of a proxy or a login "
                "instead of the file, or another version of it."
            )
        with writing(path):
            part.replace(path)
    return path


def _fetch(url: str, part: Path, path: Path, sha256: str, timeout: float) -> bool:
    """Fetches what is missing; tells whether it continued what was there."""
    offset = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout
        )
    except urllib.error.HTTPError as error:
        error.close()
        if offset and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()  # it is longer than the file, or as long and not the file
            return _fetch(url, part, path, sha256, timeout)
        _give_up(url, path, sha256, f"HTTP {error.code} {error.reason}", error)
    except (OSError, http.client.HTTPException) as error:
        _give_up(url, path, sha256, str(getattr(error, "reason", "") or error), error)
    with response:
        span = response.headers.get("Content-Range", "")
        in_part = bool(response.status == http.HTTPStatus.PARTIAL_CONTENT)
        continued = in_part and span.startswith(f"bytes {offset}-")
        if offset and in_part and not continued:
            part.unlink()  # a server that sends another range than the one asked for
            return _fetch(url, part, path, sha256, timeout)
        with writing(path):
            file = part.open("ab" if continued else "wb", buffering=0)
        with file:
            fetched = _copy(response, file, url, path, sha256)
            with writing(path):
                os.fsync(file.fileno())
    length = response.headers.get("Content-Length")
    if length is not None and fetched < int(length):
        done, whole = (n + (offset if continued else 0) for n in (fetched, int(length)))
        _give_up(url, path, sha256, f"the connection ended after {done} of {whole} bytes")
    return continued


def _copy(
    response: http.client.HTTPResponse, file: IO[bytes], url: str, path: Path, sha256: str
) -> int:
    fetched = 0
    while True:
        try:
            chunk = response.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            _give_up(url, path, sha256, f"the connection broke: {error}", error)
        if not chunk:
            return fetched
        fetched += len(chunk)
        rest = memoryview(chunk)
        while rest:
            with writing(path):
                rest = rest[file.write(rest) :]


def _give_up(
    url: str, path: Path, sha256: str, why: str, error: BaseException | None = None
) -> NoReturn:
    part = path.with_name(f"{path.name}.part")
    kept = (
        f" The first {part.stat().st_size} bytes are kept in {part.name}, and the next attempt "
        "continues there."
        if part.exists()
        else ""
    )
    raise ConnectionError(
        f"cannot download {url}: {why}.{kept} Run again when there is a connection, or fetch the "
        f"file elsewhere and put it into the folder {path.parent.absolute()} as {path.name} "
        f"(sha256 {sha256})."
    ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells of a file that cannot be written which one it is, and what to do.

    Args:
        path: The file as it will be called.

    Raises:
        OSError: With the number of the error that came, such as that of a full disk.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror}. Nothing took its name, and what was fetched "
            "is kept for the next attempt. Make room, or name a folder that can be written "
            "(root=..., or the variable ENSEMBLES_DATA)",
        ) from error


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time download into a folder, so that two do not mix their parts."""
    handle = os.open(folder, os.O_RDONLY) if fcntl else -1
    try:
        if fcntl:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(handle)
