"""Which encodings there are."""

from __future__ import annotations

from collections.abc import Mapping

from membank.wire.codec.contract import WireCodec
from membank.wire.codec.grouped import GroupedInt8
from membank.wire.codec.plain import Plain
from membank.wire.codec.sparse import Sparse
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import DTYPES


def _by_name(*codecs: WireCodec) -> dict[str, WireCodec]:
    return {codec.name: codec for codec in codecs}


FETCH_CODECS: Mapping[str, WireCodec] = _by_name(*map(Plain, DTYPES), GroupedInt8())
"""How blocks travel, by name: every payload of so many elements has the same size."""

PUSH_CODECS: Mapping[str, WireCodec] = {**FETCH_CODECS, **_by_name(Sparse())}
"""How gradients travel, by name."""


def fetch_codec(name: str) -> WireCodec:
    """Return the encoding of blocks called `name`.

    Raises
    ------
    InvalidArgumentError
        If there is none (BAD_DTYPE).
    """
    return _found(FETCH_CODECS, name, "blocks")


def push_codec(name: str) -> WireCodec:
    """Return the encoding of gradients called `name`.

    Raises
    ------
    InvalidArgumentError
        If there is none (BAD_DTYPE).
    """
    return _found(PUSH_CODECS, name, "gradients")


def _found(codecs: Mapping[str, WireCodec], name: str, what: str) -> WireCodec:
    try:
        return codecs[name]
    except KeyError:
        raise InvalidArgumentError(
            f"unknown dtype {name!r}; {what} travel as {', '.join(codecs)}",
            reason=Reason.BAD_DTYPE,
            metadata={"dtype": name},
        ) from None
