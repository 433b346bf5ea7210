"""API keys: hashed at rest, several, each with limits of its own, some for the control routes.

A key is 32 random bytes, so one SHA-256 is hash enough (there is no dictionary to try). The file is YAML, written by
`puyu keys`, and read again when it changes; a key is shown once, when it is made.

    ring = KeyRing.load(Path("keys.yaml")); ring.find("puyu-...")
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import Field

from puyu.configure import Config, build, dump, load_yaml
from puyu.errors import ConfigError
from puyu.files import write_text
from puyu.log import logger

CHECK_SECONDS = 1.0


class Key(Config):
    """What a file holds of one key."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    control: bool = False
    """Whether it opens the control routes (and those alone)."""
    requests_per_minute: int = Field(default=0, ge=0)
    """0 is without limit, here and below."""
    tokens_per_minute: int = Field(default=0, ge=0)
    """Tokens of prompts and answers together; what is over counts against the next minute."""
    concurrent: int = Field(default=0, ge=0)
    """Requests at the same time."""


class KeyFile(Config):
    """The file as a whole."""

    keys: tuple[Key, ...] = ()


@dataclass(slots=True)
class Bucket:
    """So much a minute, refilled steadily; may be overdrawn."""

    per_minute: int
    level: float = 0.0
    at: float = 0.0

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0 is now."""
        if not self.per_minute:
            return 0.0
        if not self.at:
            self.level = float(self.per_minute)
        else:
            self.level = min(self.level + (now - self.at) * self.per_minute / 60, float(self.per_minute))
        self.at = now
        return max(1 - self.level, 0.0) * 60 / self.per_minute

    def take(self, count: int) -> None:
        self.level -= count


@dataclass(slots=True)
class Account:
    """A key and what has been done with it."""

    key: Key
    requests: Bucket = field(init=False)
    tokens: Bucket = field(init=False)
    in_flight: int = 0

    def __post_init__(self) -> None:
        self.requests = Bucket(self.key.requests_per_minute)
        self.tokens = Bucket(self.key.tokens_per_minute)

    def admit(self, now: float) -> float:
        """Seconds that the caller must wait; 0: a request has been counted."""
        wait = max(self.requests.wait(now), self.tokens.wait(now))
        if self.key.concurrent and self.in_flight >= self.key.concurrent:
            wait = max(wait, 1.0)
        if wait == 0:
            self.requests.take(1)
        return wait


class KeyRing:
    """The keys that open a server."""

    def __init__(self, keys: Sequence[Key], *, path: Path | None = None, clock: Callable[[], float] = time.monotonic):
        self.path, self.clock = path, clock
        self._fixed = [] if path is not None else list(keys)
        self._stamp = self._mtime()
        self._checked = clock()
        self._accounts = {key.sha256: Account(key) for key in keys}

    @classmethod
    def load(cls, path: Path) -> KeyRing:
        """ConfigError says what is wrong with the file."""
        return cls(read_keys(path).keys, path=path)

    @classmethod
    def of(cls, keys_file: str, *, api_key: str = "", control_key: str = "") -> KeyRing:
        """The keys of a file, if there is one, and those of the command line; they cannot be the same."""
        ring = cls.load(Path(keys_file)) if keys_file else cls(())
        if api_key and api_key == control_key:
            raise ConfigError("the control key is the API key", remedy="choose another control key")
        for name, token in (("api-key", api_key), ("control-key", control_key)):
            if token:
                ring.add(Key(name=name, sha256=digest(token), control=name == "control-key"))
        return ring

    def add(self, key: Key) -> None:
        """A key that stands in no file."""
        self._fixed.append(key)
        self._accounts[key.sha256] = Account(key)

    @property
    def has_control(self) -> bool:
        return any(account.key.control for account in self._accounts.values())

    @property
    def is_empty(self) -> bool:
        """Whether no key opens the ordinary routes."""
        return all(account.key.control for account in self._accounts.values())

    def find(self, token: str) -> Account | None:
        """The account of a key. Hashes are looked up, so the time tells nothing about any key."""
        self._refresh()
        return self._accounts.get(digest(token))

    def _refresh(self) -> None:
        """Read the file again when it has changed; a file that cannot be read leaves the keys as they are."""
        now = self.clock()
        if self.path is None or now - self._checked < CHECK_SECONDS:
            return
        self._checked = now
        stamp = self._mtime()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = [*read_keys(self.path).keys, *self._fixed]
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        old = self._accounts
        kept = {key.sha256: old[key.sha256] for key in keys if key.sha256 in old and old[key.sha256].key == key}
        self._accounts = {key.sha256: kept.get(key.sha256) or Account(key) for key in keys}
        logger.info("read %d keys again", len(keys))

    def _mtime(self) -> int:
        try:
            return self.path.stat().st_mtime_ns if self.path is not None else 0
        except OSError:
            return -1


def digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> KeyFile:
    """The file; ConfigError names what cannot be read."""
    if not path.is_file():
        raise ConfigError(f"there is no key file {path}", remedy=f"make one: puyu keys new NAME --file {path}")
    found = build(KeyFile, load_yaml(path), where=str(path))
    names = [key.name for key in found.keys]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path} holds two keys of the same name", remedy="remove one: puyu keys revoke NAME")
    return found


def new_key(path: Path, name: str, **limits: bool | int) -> str:
    """Add a key to the file, which only its owner may read; returns the key, which is kept nowhere."""
    known = read_keys(path).keys if path.exists() else ()
    if any(key.name == name for key in known):
        raise ConfigError(f"{path} has a key {name!r} already", remedy=f"puyu keys revoke {name} --file {path}")
    token = f"puyu-{secrets.token_urlsafe(32)}"
    added = build(Key, {"name": name, "sha256": digest(token), **limits}, where="puyu keys new")
    _write(path, KeyFile(keys=(*known, added)))
    return token


def revoke(path: Path, name: str) -> None:
    """Take a key out of the file; servers notice within a second."""
    known = read_keys(path).keys
    kept = tuple(key for key in known if key.name != name)
    if len(kept) == len(known):
        raise ConfigError(f"{path} has no key {name!r}", remedy="puyu keys list shows them")
    _write(path, KeyFile(keys=kept))


def _write(path: Path, keys: KeyFile) -> None:
    write_text(path, yaml.safe_dump(dump(keys), sort_keys=False))
    path.chmod(0o600)
