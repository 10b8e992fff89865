"""Pickle, for those who choose it: a codec for classes that have no better one. No other module unpickles anything."""

from __future__ import annotations

import base64
import hashlib
import hmac
import pickle
from typing import Any

MIN_KEY_BYTES = 16

_PROTOCOL = 5  # the highest that Python 3.10 to 3.13 share
_CONTEXT = b"ebbs_and_flows.PickleCodec.1\x00"


class PickleCodec:
    """Stores values of a class as a signed pickle: `register_codec(Legacy, PickleCodec(key))`.

    The signature (HMAC-SHA256) is verified before anything is unpickled, so who can write to the database but does not
    know the key cannot run code here. Two limits: who knows the key can. And a signature says that a holder of the key
    made this value once, not that it belongs where it is found: an older value, or another execution's, can be put in
    its place, as long as it is of the same class.

    Args:
        key: a secret of at least 16 bytes, the same in each process that reads the values; 32 random bytes are good.

    Raises:
        ValueError: the key is not bytes, or too short.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) < MIN_KEY_BYTES:
            raise ValueError(
                f"PickleCodec needs a key of at least {MIN_KEY_BYTES} bytes: secrets.token_bytes(32) makes one"
            )
        self._key = key

    def __repr__(self) -> str:
        return "PickleCodec(key=...)"

    def encode(self, value: Any, /) -> str:
        """Give signature and pickle as base64."""
        pickled = pickle.dumps(value, protocol=_PROTOCOL)
        return base64.b64encode(self._signature(pickled) + pickled).decode("ascii")

    def decode(self, encoded: Any, /) -> Any:
        """Verify the signature, then unpickle.

        Raises:
            ValueError: this is not what `encode` wrote with the same key.
        """
        if not isinstance(encoded, str):
            raise ValueError(f"expected a base64 string, found {type(encoded).__name__}")
        signed = base64.b64decode(encoded, validate=True)
        signature, pickled = signed[: hashlib.sha256().digest_size], signed[hashlib.sha256().digest_size :]
        if not hmac.compare_digest(signature, self._signature(pickled)):
            raise ValueError("its signature is wrong: it was altered, or signed with another key")
        return pickle.loads(pickled)

    def _signature(self, pickled: bytes) -> bytes:
        return hmac.digest(self._key, _CONTEXT + pickled, "sha256")
