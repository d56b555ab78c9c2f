"""Signatures of receipts and packs."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path

import pytest

from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from membank.wire.signing import Context, PublicKey, Signature, Signer, TrustedKeys


def test_a_signature_holds_for_its_message_context_and_key_alone() -> None:
    signer = Signer.generate()
    signature = signer.sign(Context.PACK, b"message")
    signature.check(Context.PACK, b"message", what="it")
    other = Signature(Signer.generate().public_key, signature.value)
    for wrong, context, message in (
        (signature, Context.RECEIPT, b"message"),
        (signature, Context.PACK, b"massage"),
        (other, Context.PACK, b"message"),
    ):
        with pytest.raises(CorruptionError) as caught:
            wrong.check(context, message, what="it")
        assert caught.value.reason is Reason.BAD_SIGNATURE


def test_a_signature_travels_as_json() -> None:
    signature = Signer.generate().sign(Context.RECEIPT, b"message")
    assert Signature.from_json(signature.to_json(), what="it") == signature
    for body in (None, {}, {**signature.to_json(), "algorithm": "none"}, {"algorithm": "ed25519"}):
        with pytest.raises(CorruptionError, match="cannot be read"):
            Signature.from_json(body, what="it")


def test_a_key_is_made_once_and_is_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "service.pem"
    made = Signer.load_or_create(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Signer.load_or_create(file).public_key == made.public_key
    assert [path.name for path in file.parent.iterdir()] == ["service.pem"]
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(made)


@pytest.mark.parametrize("content", [None, b"", b"not a key"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "key.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FailedPreconditionError) as caught:
        Signer.load(file)
    assert caught.value.reason is Reason.BAD_KEY


def test_only_trusted_keys_say_who_signed(tmp_path: Path) -> None:
    ours, theirs = Signer.generate(), Signer.generate()
    file = tmp_path / "trusted"
    file.write_text(f"# who\n{ours.public_key.text} the service\n\n")
    trusted = TrustedKeys.load(file)
    assert trusted.require(ours.sign(Context.PACK, b""), what="it") == "the service"
    with pytest.raises(FailedPreconditionError) as caught:
        trusted.require(theirs.sign(Context.PACK, b""), what="it")
    assert caught.value.reason is Reason.UNTRUSTED_KEY
    file.write_text("nonsense\n")
    with pytest.raises(InvalidArgumentError, match="not an Ed25519"):
        TrustedKeys.load(file)
    with pytest.raises(InvalidArgumentError):
        PublicKey.parse("AAAA")
