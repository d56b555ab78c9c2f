"""The coordinator of a bank, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import campaign_bank as asked
from campaign_bank import MARKED, NUM_SHARDS, SPEC, Phase
from campaign_board import ArmedKill
from campaign_setting import SHARDS, Setting
from campaign_shard import RemoteShard
from membank.bank_service.knowledge import (
    AdminRequest,
    BankOperations,
    Coordinator,
    CoordinatorConfig,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.store import Bank
from membank.wire.records import GarbageReport, TransactionReport
from membank.wire.spec import BlockRef
from membank.wire.steps import Delete, Restore, Swap, Withhold
from storage_faults import FaultyObjects

PRINCIPAL = "operator"
"""Who changes the bank."""


class OperatorDesk:
    """The coordinator of a bank and its operations, as operators call them.

    Parameters
    ----------
    setting
        Which bank.
    plan
        Kills at a call of the storage.
    """

    def __init__(self, setting: Setting, plan: ArmedKill) -> None:
        bank = Bank.open(FaultyObjects(setting.objects(), plan))
        self._members = tuple(
            ShardMember(
                shard_id=seat,
                partitions=tuple(range(index, SPEC.num_partitions, NUM_SHARDS)),
                handle=RemoteShard(setting.address(seat)),
            )
            for index, seat in enumerate(SHARDS)
        )
        group = ShardGroup(bank.spec, self)
        log, trees = RevisionLog(bank), TreeStore(bank)
        coordinator = Coordinator(
            bank, group, log=log, trees=trees, config=CoordinatorConfig(commit_pause_s=0.01)
        )
        self._operations = BankOperations(bank, group, coordinator, log=log, trees=trees)
        self._coordinator = coordinator

    def members(self) -> tuple[ShardMember, ...]:
        # docstring inherited
        return self._members

    def phase(self, method: str, args: Sequence[Any]) -> Phase:
        # docstring inherited
        found: Phase = args[0].phase if method == "change" else Phase.OPENING
        return found

    def answer(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # docstring inherited
        if method == "recover":
            return self._coordinator.recover()
        return self._change(*args, **kwargs)

    def stop(self) -> None:
        # docstring inherited
        return

    def _change(self, operation: asked.AdminOperation) -> TransactionReport | GarbageReport:
        operations = self._operations
        request = AdminRequest(request_id=operation.request_id, principal=PRINCIPAL)
        match operation:
            case asked.Swap(value=value):
                contents = [
                    Swap(ref=ref, weight=asked.marked_content(ref, value)) for ref in MARKED
                ]
                return operations.apply(request, contents).report
            case asked.Replace(refs=refs, number=number):
                return operations.apply(request, _numbered(refs, number)).report
            case asked.Withhold():
                return operations.apply(request, [Withhold(topic=asked.HIDDEN_TOPIC)]).report
            case asked.Restore():
                return operations.apply(request, [Restore(topic=asked.HIDDEN_TOPIC)]).report
            case asked.TakeSnapshot(name=name):
                revision = operations.create_snapshot(request, name).revision
                return TransactionReport(revision=revision, changes=())
            case asked.DropSnapshot(name=name):
                _, revision = operations.delete_snapshot(request, name)
                return TransactionReport(revision=revision, changes=())
            case asked.RollBack(target=target, topic=topic, only_block=only_block):
                return operations.rollback(request, target, topic, only_block=only_block)
            case asked.Delete():
                return operations.apply(request, [Delete(topic=asked.DOOMED_TOPIC)]).report
            case asked.Recreate(number=number, packed=True):
                return operations.import_topic(request, asked.doomed_pack(number))[0]
            case asked.Recreate(number=number):
                return operations.apply(request, _numbered(asked.DOOMED, number)).report
            case asked.Collect(keep_revisions=keep_revisions):
                return operations.collect_garbage(request, keep_revisions=keep_revisions)


def _numbered(refs: Sequence[BlockRef], number: int) -> list[Swap]:
    return [Swap(ref=ref, weight=asked.numbered_content(ref, number)) for ref in refs]
