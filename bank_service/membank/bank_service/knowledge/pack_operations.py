"""Exports and imports: topics that leave a bank, come back, or stay in its own store."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO, cast

from membank.bank_service.knowledge import packs
from membank.bank_service.knowledge.contract import AdminRequest, ExportedPack
from membank.bank_service.knowledge.diffs import Difference, check_base
from membank.bank_service.knowledge.history import History
from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import ShardGroup
from membank.bank_service.knowledge.steps import deleted_topic
from membank.bank_service.knowledge.stored_packs import (
    PACK_OPERATION,
    STORED_PACK,
    StoredPacks,
    detail_of,
    pack_of,
)
from membank.bank_service.knowledge.transactions import Coordinator, Plan
from membank.bank_service.knowledge.trees import TreeStore, tree_changes
from membank.bank_service.store import Bank
from membank.bank_service.store.objects import storage_error
from membank.wire.crc import Buffer
from membank.wire.errors import MembankError
from membank.wire.format.pack import (
    FinishedPack,
    Pack,
    PackWriter,
    check_fits,
    check_signatures,
    decode_pack,
    moved,
)
from membank.wire.format.stored_pack import PackRecord
from membank.wire.records import StoredPack, TransactionReport
from membank.wire.signing import Signer, TrustedKeys
from membank.wire.spec import BankSpec, BlockRef, BlockState

SPOOL_BYTES = 32 << 20
"""Bytes of a pack that wait in memory while it is put together; of a larger one, all wait in a file
without a name in the directory of temporary files (``$TMPDIR``)."""


class PackOperations:
    """The packs of one bank.

    Parameters
    ----------
    bank
        The bank.
    shards
        All its shards.
    coordinator
        Runs the transactions.
    log
        The bank's records.
    trees
        The bank's tree documents.
    history
        The bank's earlier states.
    signer
        Signs what is exported; None = nobody does.
    trusted_keys
        Keys of which one must have signed what is imported; None = anything is taken.
    clock
        Seconds since 1970-01-01 UTC.
    """

    def __init__(
        self,
        bank: Bank,
        shards: ShardGroup,
        coordinator: Coordinator,
        *,
        log: RevisionLog,
        trees: TreeStore,
        history: History,
        signer: Signer | None,
        trusted_keys: TrustedKeys | None,
        clock: Callable[[], float],
    ) -> None:
        self._spec: BankSpec = bank.spec
        self._shards = shards
        self._coordinator = coordinator
        self._log = log
        self._trees = trees
        self._history = history
        self._signers = () if signer is None else (signer,)
        self._trusted = trusted_keys
        self._clock = clock
        self._stored = StoredPacks(bank)

    def export(
        self, topic: BlockRef, *, weights_only: bool, since: str | int | None
    ) -> ExportedPack:
        """See `BankAdmin.export_topic`."""
        spool = cast("BinaryIO", tempfile.SpooledTemporaryFile(SPOOL_BYTES))  # noqa: SIM115  # handed on
        try:
            # Settled: a shard that lags would hand out what a commit has deleted, as of after that.
            with self._coordinator.settled(), _spooling():
                head, pack = self._put_together(spool, topic, weights_only, since)
                return ExportedPack(pack, spool, revision=head.revision)
        except BaseException:
            spool.close()
            raise

    def store(
        self, topic: BlockRef, name: str, *, weights_only: bool, since: str | int | None
    ) -> ExportedPack:
        """See `BankAdmin.store_pack`."""
        spool = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115  # handed on
        try:
            # The lock is held to the end: a deletion in between would overlook the pack.
            with self._coordinator.settled(), _spooling():
                head, pack = self._put_together(spool, topic, weights_only, since)
                record = PackRecord(
                    pack=StoredPack(
                        name=name,
                        topic=topic,
                        revision=head.revision,
                        num_bytes=pack.num_bytes,
                        create_time_s=self._clock(),
                    ),
                    sha256=pack.sha256,
                    refs=frozenset(head.refs) | pack.refs,
                )
                self._stored.write(record, pack.pieces(_mapped(spool)))
                return ExportedPack(pack, spool, revision=head.revision)
        except BaseException:
            spool.close()
            raise

    def list(self) -> tuple[StoredPack, ...]:
        """See `BankAdmin.list_packs`."""
        return self._stored.list()

    def delete(self, request: AdminRequest, name: str) -> StoredPack:
        """See `BankAdmin.delete_pack`."""

        def plan() -> Plan:
            # The coordinator destroys it once that is on record.
            return Plan(detail=detail_of(self._stored.doomed(name)))

        outcome = self._coordinator.run(request, PACK_OPERATION, {STORED_PACK: name}, plan)
        assert outcome.record is not None  # there is no dry run of it
        return pack_of(outcome.record)

    def import_pack(
        self, request: AdminRequest, data: Buffer, *, topic: BlockRef | None, force: bool
    ) -> tuple[TransactionReport, BlockRef]:
        """See `BankAdmin.import_topic`."""
        pack = decode_pack(data)
        detail = {"signed_by": list(check_signatures(pack, self._trusted))}
        return self._install(request, pack, topic, force=force, detail=detail)

    def import_stored(
        self, request: AdminRequest, name: str, *, topic: BlockRef | None, force: bool
    ) -> tuple[TransactionReport, BlockRef]:
        """See `BankAdmin.import_stored`."""
        what = f"the stored pack {name!r}"
        pack = decode_pack(self._stored.read(name), what=what)
        signers = check_signatures(pack, self._trusted, what=what)
        detail = {"signed_by": list(signers), STORED_PACK: name}
        return self._install(request, pack, topic, force=force, detail=detail)

    def _put_together(
        self, spool: BinaryIO, topic: BlockRef, weights_only: bool, since: str | int | None
    ) -> tuple[Pack, FinishedPack]:
        """Return what is said of a topic, and its pack; under the coordinator's lock."""
        self._spec.check_ref(topic)
        refs = list(self._spec.subtree(topic))
        statuses = self._shards.describe(refs)
        kept = sorted(ref for ref, s in statuses.items() if s.state is not BlockState.DELETED)
        if not kept:
            raise deleted_topic(topic)
        committed = self._log.committed
        head = packs.head_of(
            self._spec,
            topic,
            self._trees.read(committed.tree_revision),
            revision=committed.revision,
        )
        writer = PackWriter(spool)
        if since is None:
            for content in self._shards.read(kept):
                writer.add(packs.packed(content, weights_only=weights_only))
        else:
            base = self._history.state_of(since, refs)
            difference = Difference(self._spec, base, weights_only=weights_only)
            for content in self._shards.read(
                [ref for ref in kept if difference.may_differ(statuses[ref])]
            ):
                if difference.differs(content):
                    was = difference.base_of(content.ref)
                    writer.add(packs.packed(content, weights_only=weights_only, base=was))
            head = replace(head, base=difference.described())
        return head, writer.finish(head, signers=self._signers)

    def _install(
        self,
        request: AdminRequest,
        pack: Pack,
        topic: BlockRef | None,
        *,
        force: bool,
        detail: Mapping[str, object],
    ) -> tuple[TransactionReport, BlockRef]:
        source = pack.topic
        if topic not in {None, source}:
            pack = moved(pack, topic, self._spec)

        def plan() -> Plan:
            tree = self._trees.read(self._log.committed.tree_revision)
            check_fits(pack, self._spec, tree)
            after = packs.tree_with(pack, tree, is_moved=pack.topic != source)
            return Plan(
                operations=packs.contents_of(pack, self._expected(pack, force=force)),
                detail={
                    "topic": str(pack.topic),
                    "from_bank": pack.spec.bank_id,
                    "from_topic": str(source),
                    "from_revision": pack.revision,
                    "forced": force,
                    **detail,
                },
                tree=after,
                tree_changes=() if after is None else tree_changes(tree, after),
            )

        asked = {
            "pack_sha256": pack.sha256,
            STORED_PACK: detail.get(STORED_PACK),
            "topic": str(pack.topic),
            "force": force,
        }
        return self._coordinator.run(request, "import", asked, plan).report, pack.topic

    def _expected(self, pack: Pack, *, force: bool) -> dict[BlockRef, int]:
        """Return the versions that blocks must keep; raises where a diff does not fit."""
        if pack.base is None or force:
            return {}
        refs = {block.ref for block in pack.blocks} | pack.base.unchanged.keys()
        return check_base(pack, self._spec, self._shards.describe(sorted(refs)))


@contextmanager
def _spooling() -> Iterator[None]:
    """Say what is wrong where a pack cannot be put together in a file."""
    try:
        yield
    except MembankError:
        raise  # some are OSErrors, too
    except OSError as err:
        raise storage_error(err, f"{tempfile.gettempdir()} ($TMPDIR)") from err


def _mapped(spool: BinaryIO) -> memoryview:
    """Map a file, so that its bytes are in memory only while they are copied."""
    if spool.seek(0, os.SEEK_END) == 0:
        return memoryview(b"")  # what is empty cannot be mapped
    # Unmapped with the last view of it: an error on its way up may hold one.
    return memoryview(mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ))
