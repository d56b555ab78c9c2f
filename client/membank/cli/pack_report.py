"""What `membank pack inspect` says of a pack."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from membank.cli.output import console, format_bytes, table
from membank.wire.errors import CorruptionError, MembankError
from membank.wire.format.pack import Pack
from membank.wire.signing import Context, Signature, TrustedKeys

_ROWS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SignatureReport:
    """What a signature of a pack is worth."""

    key_id: str
    """Id of the key."""
    public_key: str
    """The key, in base64."""
    is_valid: bool
    """Whether it was made of this pack, by that key."""
    trusted_as: str | None
    """Name of the key among the trusted ones; None = it is not there, or nobody said which are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What a pack holds, and who says so."""

    pack: Pack
    """The pack."""
    num_bytes: int
    """Size of the file."""
    signatures: tuple[SignatureReport, ...]
    """Its signatures."""
    is_compared: bool = False
    """Whether it was compared with a bank."""
    misfit: MembankError | None = None
    """Why that bank does not take it; None = it does, or none was asked."""

    def fitting(self, misfit: MembankError | None) -> PackReport:
        """Return the report after a comparison with a bank."""
        return replace(self, is_compared=True, misfit=misfit)

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON-able values."""
        pack, base = self.pack, self.pack.base
        return {
            "topic": str(pack.topic),
            "label": pack.labels.get(pack.topic, ""),
            "bytes": self.num_bytes,
            "sha256": pack.sha256,
            "bank": {"name": pack.spec.name, "bank_id": pack.spec.bank_id},
            "revision": pack.revision,
            "anchor_fingerprint": pack.spec.fingerprint,
            "retriever_sha256": pack.retriever_sha256,
            "dtype": pack.spec.dtype,
            "optimizer": pack.spec.optimizer.kind.value,
            "base": None
            if base is None
            else {
                "revision": base.revision,
                "snapshot": base.snapshot,
                "unchanged_blocks": len(base.unchanged),
            },
            "blocks": [
                {
                    "block": str(block.ref),
                    "label": pack.labels.get(block.ref, ""),
                    "version": block.version,
                    "step": block.step,
                    "bytes": block.weight.nbytes,
                    "optimizer_bytes": sum(a.nbytes for a in block.optimizer_state.values()),
                    "base_version": None if block.base is None else block.base.version,
                }
                for block in pack.blocks
            ],
            "signatures": [
                {
                    "key_id": signature.key_id,
                    "public_key": signature.public_key,
                    "valid": signature.is_valid,
                    "trusted_as": signature.trusted_as,
                }
                for signature in self.signatures
            ],
            "fits_bank": self.misfit is None if self.is_compared else None,
            "misfit": None if self.misfit is None else str(self.misfit),
        }


def describe_pack(pack: Pack, num_bytes: int, trusted: TrustedKeys | None) -> PackReport:
    """Return the report of a pack.

    Parameters
    ----------
    pack
        The pack, as `decode_pack` returned it.
    num_bytes
        Size of its file.
    trusted
        Keys that count; None = nobody said.
    """
    return PackReport(
        pack=pack,
        num_bytes=num_bytes,
        signatures=tuple(
            SignatureReport(
                key_id=signature.public_key.key_id,
                public_key=signature.public_key.text,
                is_valid=_is_valid(signature, pack),
                trusted_as=None if trusted is None else trusted.get(signature.public_key),
            )
            for signature in pack.signatures
        ),
    )


def show_pack(where: str, report: PackReport) -> None:
    """Print a report for people."""
    pack = report.pack
    label = pack.labels.get(pack.topic)
    named = f"{pack.topic} ({label})" if label else f"{pack.topic}"
    console.print(
        f"{where}: topic {named}, {format_bytes(report.num_bytes)}, whole; from bank "
        f"{pack.spec.name} at revision {pack.revision}"
    )
    if (base := pack.base) is not None:
        state = (
            f"snapshot {base.snapshot}" if base.snapshot else f"the end of revision {base.revision}"
        )
        console.print(
            f"a diff against {state}: {len(pack.blocks)} blocks changed, {len(base.unchanged)} did not"
        )
    console.print(f"anchor and tokenizer: {pack.spec.fingerprint or 'not bound to any'}")
    console.print(f"retriever: {pack.retriever_sha256 or 'none'}")
    for signature in report.signatures:
        worth = "valid" if signature.is_valid else "[red]NOT of this pack[/]"
        whose = f", trusted as {signature.trusted_as}" if signature.trusted_as else ""
        console.print(
            f"signature of key {signature.key_id} ({signature.public_key}): {worth}{whose}"
        )
    if not report.signatures:
        console.print("not signed")
    console.print(_block_table(pack))
    if len(pack.blocks) > _ROWS:
        console.print(f"... and {len(pack.blocks) - _ROWS} more (--json lists them)")
    if report.is_compared:
        fits = "the bank takes it" if report.misfit is None else f"[red]no fit[/]: {report.misfit}"
        console.print(fits)


def _block_table(pack: Pack) -> object:
    counts = Counter(block.ref.level for block in pack.blocks)
    title = ", ".join(f"level {level}: {count}" for level, count in sorted(counts.items()))
    rows = [
        (
            block.ref,
            pack.labels.get(block.ref, ""),
            f"v{block.version}",
            block.step,
            format_bytes(block.weight.nbytes),
            format_bytes(sum(array.nbytes for array in block.optimizer_state.values())),
        )
        for block in pack.blocks[:_ROWS]
    ]
    columns = ("block", "label", "version>", "steps>", "weights>", "optimizer>")
    return table(columns, rows, title=f"blocks ({title or 'none'})")


def _is_valid(signature: Signature, pack: Pack) -> bool:
    try:
        signature.check(Context.PACK, bytes.fromhex(pack.sha256), what="the pack")
    except CorruptionError:
        return False
    return True
