"""How arrays travel: as they are, with fewer bits, or in part (docs/wire.md)."""

from membank.wire.codec.contract import Bytes, Encoded, Take, WireCodec, fresh
from membank.wire.codec.grouped import GROUP, GroupedInt8
from membank.wire.codec.plain import Plain
from membank.wire.codec.registry import FETCH_CODECS, PUSH_CODECS, fetch_codec, push_codec
from membank.wire.codec.sparse import Sparse

__all__ = [
    "FETCH_CODECS",
    "GROUP",
    "PUSH_CODECS",
    "Bytes",
    "Encoded",
    "GroupedInt8",
    "Plain",
    "Sparse",
    "Take",
    "WireCodec",
    "fetch_codec",
    "fresh",
    "push_codec",
]
