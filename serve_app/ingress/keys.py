"""API keys: the file or variable that lists them, as hashes, and the search for the one that a client presents.

One key a line; `#` starts a comment:

    <name> sha256:<64 hex digits> [roles=inference,metrics,admin] [requests_per_minute=600] [tokens_per_minute=100000]
        [priority=bulk]

With `priority=bulk` every request of the key waits while interactive ones are there.

Keys are made here, with 256 random bits, so a plain SHA-256 of one tells nothing about it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from serve_app.config import ApiKeysConfig
from serve_app.errors import ConfigError
from serve_app.types import Priority

logger = logging.getLogger(__name__)

Role: TypeAlias = Literal["inference", "metrics", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

LOOK_AGAIN_S = 1.0
"""How often, at most, a request looks whether the file has changed."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_QUOTAS = ("requests_per_minute", "tokens_per_minute")
_Signature: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of one key; `digest` is its SHA-256."""

    name: str
    digest: bytes
    roles: frozenset[Role] = frozenset({"inference"})
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    priority: Priority = "interactive"

    @property
    def line(self) -> str:
        """As it stands in the file."""
        parts = [self.name, f"sha256:{self.digest.hex()}", f"roles={','.join(sorted(self.roles))}"]
        parts += [f"{quota}={value}" for quota in _QUOTAS if (value := getattr(self, quota)) is not None]
        if self.priority != "interactive":
            parts.append(f"priority={self.priority}")
        return " ".join(parts)


def new_key() -> str:
    """A key that nobody else has."""
    return f"sa_{secrets.token_urlsafe(32)}"


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(text: str, where: str) -> tuple[Key, ...]:
    """The keys of a list. Raises ConfigError that names line and reason, and never what stands there."""
    keys: dict[str, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            key = _read_key(words)
        except ValueError as error:
            raise ConfigError(f"{where}: line {number}: {error}") from None
        if key.name in keys:
            raise ConfigError(f"{where}: line {number}: a key of this name stands above already")
        keys[key.name] = key
    if not keys:
        raise ConfigError(f"{where}: no keys; make one with `serve-app key new <name>`")
    return tuple(keys.values())


def _read_key(words: list[str]) -> Key:
    name, *rest = words
    if not _NAME.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, dots, dashes and underscores")
    found = _HASH.fullmatch(rest[0]) if rest else None
    if found is None:
        raise ValueError("after the name comes sha256: and 64 hex digits, as `serve-app key new` prints them")
    options = [word.partition("=") for word in rest[1:]]
    roles: frozenset[Role] = frozenset({"inference"})
    quotas: dict[str, int] = {}
    priority: Priority = "interactive"
    for option, _, value in options:
        if option == "roles":
            roles = _read_roles(value)
        elif option in _QUOTAS:
            quotas[option] = _read_quota(option, value)
        elif option == "priority":
            priority = _read_priority(value)
        else:
            raise ValueError(f"options are roles, {', '.join(_QUOTAS)} and priority, written as option=value")
    return Key(name, bytes.fromhex(found[1]), roles, quotas.get(_QUOTAS[0]), quotas.get(_QUOTAS[1]), priority)


def _read_roles(value: str) -> frozenset[Role]:
    roles = value.split(",")
    if not set(roles) <= set(ROLES):
        raise ValueError(f"roles are {', '.join(ROLES)}")
    return frozenset(cast("list[Role]", roles))


def _read_priority(value: str) -> Priority:
    if value not in get_args(Priority):
        raise ValueError(f"priority is {' or '.join(get_args(Priority))}")
    return cast("Priority", value)


def _read_quota(option: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and 0 < len(value) <= 12 and int(value)):
        raise ValueError(f"{option} is a whole number above 0")
    return int(value)


class KeyRing:
    """The keys in force; a changed file is read again by the next request, at most every `LOOK_AGAIN_S`.

    A file that cannot be read, or is wrong, changes nothing: the log says why, and the keys from before stay.
    """

    def __init__(self, config: ApiKeysConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if there are no keys, or the file or variable is wrong."""
        self._file = None if config.file is None else Path(os.path.expandvars(config.file)).expanduser()
        self._fixed = () if config.environment is None else keys_of_environment(config.environment)
        self._clock = clock
        self._looked = clock()
        self._signature = self._sign()
        self._keys = self._read()

    def find(self, presented: bytes) -> Key | None:
        """The key, if it is one of ours. All are compared, each in constant time."""
        self._look_again()
        digest = digest_of(presented)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _look_again(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked < LOOK_AGAIN_S:
            return
        self._looked = now
        signature = self._sign()
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._keys = self._read()
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
            return
        logger.warning("read %d API keys again, because their file has changed", len(self._keys))

    def _sign(self) -> _Signature | None:
        try:
            status = os.stat(self._file) if self._file is not None else None
        except OSError:
            return None
        return status and (status.st_mtime_ns, status.st_size, status.st_ino)

    def _read(self) -> tuple[Key, ...]:
        keys = self._fixed if self._file is None else (*self._fixed, *keys_of_file(self._file))
        if len({key.name for key in keys}) != len(keys):
            raise ConfigError("api_keys: the file and the environment variable have a key of the same name")
        return keys


def keys_of_file(path: Path) -> tuple[Key, ...]:
    """Raises ConfigError."""
    try:
        return read_keys(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path}: {reason}") from None


def keys_of_environment(name: str) -> tuple[Key, ...]:
    """Lines may also be separated by semicolons. Raises ConfigError."""
    return read_keys(os.environ.get(name, "").replace(";", "\n"), f"the environment variable {name}")


def presented_keys(headers: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """What a client offers: `Authorization: Bearer <key>` and `x-api-key: <key>`."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and key.strip():
        yield key.strip()
    if b"x-api-key" in headers:
        yield headers[b"x-api-key"].strip()
