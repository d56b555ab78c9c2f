"""Who signed a pack, and whether that counts."""

from __future__ import annotations

from typing import BinaryIO

from membank.wire.crc import Buffer
from membank.wire.errors import FailedPreconditionError, Reason
from membank.wire.format.pack.contract import Pack
from membank.wire.format.pack.digest import canonical
from membank.wire.format.pack.document import METADATA_KEY
from membank.wire.format.pack.reading import decode_pack, document_of
from membank.wire.format.pack.tensors import data_of, decode_file, encode_head, kinds_of
from membank.wire.framing import CHUNK_BYTES
from membank.wire.signing import Context, Signature, Signer, TrustedKeys


def sign_pack(
    data: Buffer, target: BinaryIO, signer: Signer, *, what: str = "the pack"
) -> Signature:
    """Write a pack with one more signature; those that it has are checked and kept.

    Parameters
    ----------
    data
        The pack's bytes, flat; also those of a mapped file.
    target
        Binary and writable; not the file that is read.
    signer
        Who signs it. A signature of the same key that it has already is replaced by the same one.
    what
        Its name, for errors.

    Raises
    ------
    CorruptionError
        If the pack is damaged (CHECKSUM_MISMATCH), or a signature of it is bad (BAD_SIGNATURE).
    InvalidArgumentError, FailedPreconditionError
        As for `decode_pack`.
    """
    # Nobody puts a name to bytes that were not looked at.
    pack = decode_pack(data, what=what)
    check_signatures(pack, what=what)
    signature = signer.sign(Context.PACK, bytes.fromhex(pack.sha256))
    kept = [held for held in pack.signatures if held.public_key != signer.public_key]
    document = document_of(data, what=what)
    document["signatures"] = [held.to_json() for held in (*kept, signature)]
    kinds = kinds_of(decode_file(data)[1])
    target.write(encode_head({METADATA_KEY: canonical(document)}, kinds))
    content = data_of(data)
    target.writelines(
        content[start : start + CHUNK_BYTES].data for start in range(0, content.size, CHUNK_BYTES)
    )
    return signature


def check_signatures(
    pack: Pack, trusted: TrustedKeys | None = None, *, what: str = "the pack"
) -> tuple[str, ...]:
    """Check every signature of a pack, and return who signed it.

    Parameters
    ----------
    pack
        The pack, as `decode_pack` returned it.
    trusted
        Keys that count; None = any.
    what
        Its name, for errors.

    Returns
    -------
    tuple of str
        Without `trusted`, the id of each key; with it, the names of those that are trusted, at
        least one.

    Raises
    ------
    CorruptionError
        If a signature is not one of this pack (BAD_SIGNATURE), whoever's it is.
    FailedPreconditionError
        With `trusted`: if it has no signature (UNSIGNED), or none of a trusted key (UNTRUSTED_KEY).
    """
    for signature in pack.signatures:
        signature.check(Context.PACK, bytes.fromhex(pack.sha256), what=what)
    if trusted is None:
        return tuple(signature.public_key.key_id for signature in pack.signatures)
    names = tuple(
        trusted[signature.public_key]
        for signature in pack.signatures
        if signature.public_key in trusted
    )
    if not pack.signatures:
        raise FailedPreconditionError(
            f"{what} is not signed, and only packs that a trusted key has signed are taken: have its "
            "owner sign it (membank pack sign FILE --key KEY), or sign it yourself once you know "
            "where it comes from",
            reason=Reason.UNSIGNED,
        )
    if not names:
        trusted.require(pack.signatures[0], what=what)
    return names
