"""The audit log is checked: chain, receipts, and that what was deleted is gone."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import membank
from membank.bank_service.fsck import FindingKind, Head, check_bank, head_of, verify_audit
from membank.bank_service.fsck.checker import check_chain
from membank.bank_service.fsck.receipts import ReceiptCheck
from membank.bank_service.fsck.view import BankView
from membank.bank_service.store import Bank, LocalObjects
from membank.wire.errors import InvalidArgumentError
from membank.wire.format import EntryTable, encode_manifest, encode_revision
from membank.wire.format.layout import manifest_key, receipt_key, revision_key, tree_key
from membank.wire.format.receipt import Recycling, decode_receipt, sign_receipt
from membank.wire.signing import Signer, TrustedKeys
from membank.wire.spec import BlockRef
from membank.wire.steps import Delete, Swap, Withhold
from shard_rig import RIG_SPEC, ShardRig, asked

TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer.generate()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, signer: Signer) -> Path:
    """A bank with two deletions, of which the first block is there anew."""
    rig = ShardRig(tmp_path_factory.mktemp("audit") / "bank")
    rig.receipt_signer = signer
    rig.start_coordinator()
    rig.push(TOPIC, "u0")
    rig.operations.create_snapshot(asked("s"), "before")
    rig.operations.apply(asked("d1"), [Delete(topic=TOPIC)])
    weight = np.full(RIG_SPEC.block_shape(1), 2.0, np.float32)
    rig.operations.apply(asked("c"), [Swap(ref=TOPIC, weight=weight)])
    rig.operations.apply(asked("w"), [Withhold(topic=OTHER)])
    rig.operations.apply(asked("d2"), [Delete(topic=OTHER)])
    rig.close()
    return rig.objects.root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "bank")
    return tmp_path / "bank"


def found(root: Path, **options: object) -> set[tuple[FindingKind, str]]:
    report = verify_audit(LocalObjects(root), **options)  # type: ignore[arg-type]  # by each test
    return {(finding.kind, finding.key) for finding in report.found.findings}


def test_a_whole_log_holds(made: Path, signer: Signer) -> None:
    objects = LocalObjects(made)
    heads = [head_of(objects)]
    trusted = TrustedKeys({signer.public_key: "us"})
    report = verify_audit(objects, trusted=trusted, heads=heads)
    assert report.found.findings == ()
    assert report.found.checked.num_revisions == 6
    assert (report.num_deletions, report.num_receipts, report.num_blocks) == (2, 2, 6)
    assert check_bank(objects).findings == ()


class _OneObject(LocalObjects):
    """A bank of which one object is another one."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.key, self.data = "", b""

    def get(self, key: str) -> bytes:
        return self.data if key == self.key else super().get(key)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("key", [revision_key(4), revision_key(5), receipt_key(5)])
def test_no_byte_of_log_or_receipt_can_be_another(made: Path, key: str) -> None:
    objects = _OneObject(made)
    spec, data = Bank.open(objects).spec, objects.get(key)
    # Only what can tell is read again, as there are thousands of bytes.
    before = BankView(objects, spec, deep=False)
    kept = {n: link for n, link in before.chain.links.items() if revision_key(n) != key}
    objects.key = key
    for place, flip in itertools.product(range(len(data)), (1, 0x20)):
        changed = bytearray(data)
        changed[place] ^= flip
        objects.data = bytes(changed)
        view = BankView(objects, spec, deep=False)
        view._known = kept
        problems = [*check_chain(view), *ReceiptCheck()(view)]
        assert any(p.kind.severity.value == "damage" for p in problems), (place, flip)


@settings(max_examples=15)
@given(data=st.data())
def test_the_check_fails_for_any_byte_anywhere(made: Path, data: st.DataObject) -> None:
    objects = _OneObject(made)
    keys = [key for folder in ("revisions", "receipts", "keys") for key in objects.list(folder)]
    objects.key = data.draw(st.sampled_from(keys))
    content = bytearray(LocalObjects(made).get(objects.key))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    objects.data = bytes(content)
    assert verify_audit(objects).found.has_damage


def test_a_log_that_was_cut_off_is_betrayed_by_receipts_and_heads(root: Path) -> None:
    head = head_of(LocalObjects(root))
    for number in (4, 5):
        (root / revision_key(number)).unlink()
    cut = (FindingKind.LOG_CUT_OFF, receipt_key(5))
    assert cut in found(root)
    (root / receipt_key(5)).unlink()
    # The chain itself is whole again, and manifests of later revisions are only odd.
    kinds = {kind for kind, _ in found(root)}
    assert FindingKind.LOG_CUT_OFF not in kinds
    assert (FindingKind.LOG_CUT_OFF, revision_key(5)) in found(root, heads=[head])


def test_a_log_that_was_written_anew_has_another_head(root: Path) -> None:
    objects = LocalObjects(root)
    head = head_of(objects)
    record = Bank.open(objects).require_record(5)
    forged = replace(record, principal="eve")
    (root / revision_key(5)).write_bytes(encode_revision(forged))
    assert (FindingKind.HEAD_MISMATCH, revision_key(5)) in found(root, heads=[head])
    # Without a head, the receipt tells.
    assert (FindingKind.RECEIPT_MISMATCH, receipt_key(5)) in found(root)


def test_a_receipt_that_is_missing(root: Path) -> None:
    (root / receipt_key(2)).unlink()
    assert found(root) == {(FindingKind.RECEIPT_MISSING, receipt_key(2))}
    (root / receipt_key(5)).unlink()
    assert (FindingKind.RECEIPT_PENDING, receipt_key(5)) in found(root)


def test_a_receipt_without_a_deletion(root: Path) -> None:
    shutil.copy(root / receipt_key(5), root / receipt_key(4))
    assert found(root) == {(FindingKind.RECEIPT_MISMATCH, receipt_key(4))}


def test_a_receipt_of_another_deletion(root: Path) -> None:
    shutil.copy(root / receipt_key(5), root / receipt_key(2))
    assert found(root) == {(FindingKind.RECEIPT_MISMATCH, receipt_key(2))}


def test_a_receipt_signed_by_somebody_else(root: Path, signer: Signer) -> None:
    path = root / receipt_key(5)
    receipt = decode_receipt(path.read_bytes(), what="it").receipt
    path.write_bytes(sign_receipt(receipt, Signer.generate()))
    assert found(root) == {(FindingKind.RECEIPT_UNTRUSTED, receipt_key(5))}
    trusted = TrustedKeys({signer.public_key: "us"})
    assert found(root, trusted=trusted) == {(FindingKind.RECEIPT_UNTRUSTED, receipt_key(5))}
    nobody = TrustedKeys({Signer.generate().public_key: "them"})
    assert len(found(root, trusted=nobody)) == 2


@pytest.fixture
def rotated(tmp_path: Path) -> Iterator[tuple[Path, Signer, Signer]]:
    """A bank with a deletion under one key, an update, and a deletion under the next key."""
    rig = ShardRig(tmp_path / "rotated", recycles=True)
    rig.operations.apply(asked("d1"), [Delete(topic=TOPIC)])
    rig.operations.apply(asked("w"), [Withhold(topic=OTHER)])
    old = rig.receipt_signer
    rig.receipt_signer = Signer.generate()
    rig.start_coordinator()
    rig.operations.apply(asked("d2"), [Delete(topic=OTHER)])
    assert found(rig.objects.root) == set()
    yield rig.objects.root, old, rig.receipt_signer
    rig.close()


@pytest.mark.parametrize("is_trusted", [False, True])
def test_only_the_key_of_that_very_deletion_signs_its_receipt(
    rotated: tuple[Path, Signer, Signer], is_trusted: bool
) -> None:
    root, old, new = rotated
    trusted = TrustedKeys({old.public_key: "before", new.public_key: "now"})
    for number, forger in ((3, old), (1, new)):
        path = root / receipt_key(number)
        data = path.read_bytes()
        path.write_bytes(sign_receipt(decode_receipt(data, what="it").receipt, forger))
        assert found(root, trusted=trusted if is_trusted else None) == {
            (FindingKind.RECEIPT_UNTRUSTED, receipt_key(number))
        }
        path.write_bytes(data)


@pytest.mark.parametrize("who", ["coordinator", "an owner that ended"])
def test_who_has_ended_signs_nothing(rotated: tuple[Path, Signer, Signer], who: str) -> None:
    root, _, signer = rotated
    path = root / receipt_key(3)
    receipt = decode_receipt(path.read_bytes(), what="it").receipt
    assert receipt.recycling is Recycling.DONE
    ended = {
        "coordinator": receipt.deletion.coordinator,
        "an owner that ended": receipt.acknowledgements[0].confirmed_by,
    }
    forged = replace(receipt, issuer=ended[who])
    path.write_bytes(sign_receipt(forged, signer))
    assert found(root) == {(FindingKind.RECEIPT_MISMATCH, receipt_key(3))}
    # Where nobody is said to have ended, it may be.
    path.write_bytes(sign_receipt(replace(forged, recycling=Recycling.OFF), signer))
    assert found(root) == set()


def test_a_key_that_is_missing_or_another(root: Path) -> None:
    (key,) = (root / "keys").iterdir()
    name = f"keys/{key.name}"
    key.rename(key.with_name("0123456789abcdef.json"))
    kinds = {
        (FindingKind.KEY_DAMAGED, "keys/0123456789abcdef.json"),
        (FindingKind.KEY_MISSING, name),
    }
    assert found(root) == kinds


def test_a_tree_document_that_is_back(root: Path) -> None:
    (root / tree_key(0)).write_bytes(b"labels")
    assert found(root) == {(FindingKind.REMOVAL_UNFINISHED, tree_key(0))}


def test_a_manifest_that_is_back(root: Path, made: Path) -> None:
    objects = LocalObjects(root)
    bank = Bank.open(objects)
    deletion = bank.require_record(2).manifests[1]
    # The block is there anew, so no state of today tells that it must not be named before.
    entry = bank.read_manifest(1, bank.manifest_numbers(1)[-1]).entries[TOPIC]
    number = bank.manifest_numbers(1)[0]
    assert number < deletion
    old = bank.read_manifest(1, number)
    entries = EntryTable.of(old.entries).updated({TOPIC: entry})
    objects.put(manifest_key(1, number), encode_manifest(replace(old, entries=entries)))
    assert found(root) == {(FindingKind.REMOVAL_UNFINISHED, manifest_key(1, number))}


def test_what_the_commands_say(root: Path, tmp_path: Path, signer: Signer) -> None:
    head = membank("audit", "head", str(root)).out.strip()
    assert Head.parse(head) == head_of(LocalObjects(root))
    ended = membank("audit", "verify", str(root), "--head", head)
    assert ended.code == 0
    assert "2 deletions of 6 blocks, 2 receipts in order" in ended.out.replace("\n", " ")
    (root / receipt_key(2)).unlink()
    ended = membank("audit", "verify", str(root), "--json")
    assert ended.code == 1
    document = json.loads(ended.out)
    assert (document["clean"], document["num_receipts"]) == (False, 1)
    assert document["findings"][0]["kind"] == "receipt-missing"
    keys = tmp_path / "keys"
    keys.write_text("not a key\n")
    assert membank("audit", "verify", str(root), "--trusted", str(keys)).code == 2
    assert membank("audit", "verify", str(tmp_path / "nothing")).code == 2
    assert membank("audit", "verify", str(root), "--head", "5").code == 2
    assert membank("audit", "verify", "localhost:1").code == 7


@pytest.mark.parametrize("text", ["", "5", "5:xyz", f"-1:{'0' * 64}", f"5:{'0' * 63}"])
def test_what_is_no_head_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Head.parse(text)
