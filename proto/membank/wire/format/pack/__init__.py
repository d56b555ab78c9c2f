"""Packs: a topic as one safetensors file that its owner can carry (docs/packs.md).

Arrays are named ``LEVEL/CLUSTER/ROLE`` (roles as in the bank, `Role`) and ``LEVEL/CLUSTER/centroid``;
elements are kept as in the bank, bfloat16 included, so that any safetensors reader opens them. The
metadata key ``membank.pack`` holds JSON: ``pack`` is all else, the CRC-32C of every array among it,
``sha256`` is the digest of ``pack`` and of every array, and ``signatures`` are of that digest. Equal
packs are equal files.
"""

from membank.wire.format.pack.contract import (
    BlockBase,
    Pack,
    PackBase,
    PackedBlock,
    retriever_sha256,
)
from membank.wire.format.pack.document import PACK_VERSION
from membank.wire.format.pack.fitting import check_fits, moved
from membank.wire.format.pack.reading import decode_pack
from membank.wire.format.pack.signing import check_signatures, sign_pack
from membank.wire.format.pack.writing import FinishedPack, PackWriter, encode_pack

__all__ = [
    "PACK_VERSION",
    "BlockBase",
    "FinishedPack",
    "Pack",
    "PackBase",
    "PackWriter",
    "PackedBlock",
    "check_fits",
    "check_signatures",
    "decode_pack",
    "encode_pack",
    "moved",
    "retriever_sha256",
    "sign_pack",
]
