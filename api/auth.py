"""API keys: several, kept as hashes, compared in constant time."""

import hashlib
import hmac
import re
from pathlib import Path

from aiohttp import web

from api.settings import ApiSettings
from runtime.errors import ConfigError, RequestError

_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


class ApiKeys:
    """The keys that open the generation endpoints. Without any, every request passes."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(_digest_of(key) for key in keys)

    @classmethod
    def from_settings(cls, settings: ApiSettings) -> "ApiKeys":
        """Keys named in the settings and in their file. Raises ConfigError when the file cannot be read."""
        keys = list(settings.api_keys)
        if settings.api_keys_file is not None:
            try:
                lines = Path(settings.api_keys_file).read_text().splitlines()
            except OSError as error:
                raise ConfigError(f"api_keys_file: cannot read {settings.api_keys_file}: {error.strerror}") from None
            keys += [key for line in lines if (key := line.partition("#")[0].strip())]
            if not keys:
                raise ConfigError(f"api_keys_file: {settings.api_keys_file} holds no key")
        return cls(tuple(keys))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accepts(self, key: str) -> bool:
        """Takes the same time whichever key, or none, matches."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found

    def check(self, request: web.Request) -> None:
        """Raises RequestError (401) for a guarded path without a right key."""
        if not self._digests or request.method == "OPTIONS" or not is_guarded(request.path):
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else ""
        if not key and request.path.startswith("/v1/messages"):
            key = request.headers.get("x-api-key", "")
        if not self.accepts(key):
            raise RequestError("Missing or wrong API key.", status=401, code="invalid_api_key")


_OPEN = frozenset(("/health", "/ping", "/metrics", "/version", "/load", "/openapi.json"))


def is_guarded(path: str) -> bool:
    """Everything but probes, metrics, the description and what the cluster's own parts call."""
    return path not in _OPEN and not path.startswith("/cluster/")


def _digest_of(key: str) -> bytes:
    hashed = _HASHED.fullmatch(key)
    if hashed is not None:
        return bytes.fromhex(hashed[1])
    if key.startswith("sha256:"):
        raise ConfigError("api_keys: expected 64 hex digits after sha256:")
    return hashlib.sha256(key.encode()).digest()
