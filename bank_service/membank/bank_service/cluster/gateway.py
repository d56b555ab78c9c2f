"""What the gateway answers: nothing but `CreateBank` until there is a bank, then its operations."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from membank.bank_service.cluster.identity import server_version
from membank.bank_service.knowledge.contract import AdminRequest, BankAdmin
from membank.bank_service.knowledge.operations import BankOperations
from membank.bank_service.knowledge.receipts import NoRecycler, ReceiptDesk
from membank.bank_service.knowledge.requests import request_sha256, reused
from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import ShardDirectory, ShardGroup
from membank.bank_service.knowledge.transactions import Coordinator
from membank.bank_service.knowledge.trees import TreeStore
from membank.bank_service.shard.config import ShardConfig
from membank.bank_service.store import Bank
from membank.wire.errors import (
    AlreadyExistsError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import TreeDocument, decode_tree, encode_tree
from membank.wire.format.document import spec_to_json
from membank.wire.format.receipt import Recycling
from membank.wire.format.revision import REQUEST_SHA256
from membank.wire.records import (
    BankInfo,
    Placement,
)
from membank.wire.signing import Signer, TrustedKeys
from membank.wire.spec import BankSpec

_LOG = logging.getLogger(__name__)


class Fleet(ShardDirectory, Protocol):
    """The shards that a gateway speaks for."""

    def placement(self) -> Placement:
        """Return the placement in force."""

    def all_serve(self) -> bool:
        """Say whether every shard answered when it was asked last."""

    def recycle(self, shard_ids: Sequence[str]) -> None:
        """Let other processes take the place of those of shards; they serve when it returns."""


class StartFleet(Protocol):
    """Starts the shards of a bank."""

    def __call__(self, spec: BankSpec, *, insist: bool) -> Fleet:
        """Return the shards; with `insist`, all of them serve then."""


@dataclass(frozen=True, slots=True)
class _FleetRecycler:
    """A `Recycler` for the shards of a fleet."""

    fleet: Fleet
    outcome: Recycling = Recycling.DONE

    def recycle(self, shard_ids: Sequence[str]) -> None:
        # docstring inherited
        self.fleet.recycle(shard_ids)


@dataclass(frozen=True, slots=True)
class _Served:
    """All that exists once there is a bank."""

    bank: Bank
    fleet: Fleet
    log: RevisionLog
    trees: TreeStore
    coordinator: Coordinator
    operations: BankAdmin


class Gateway:
    """A `BankHost` and a `BankSource` for one service.

    Parameters
    ----------
    bank_url
        Where the bank is, or will be.
    start_fleet
        Starts the shards of a bank.
    keyring_url
        Where its keyring is; empty = it is not sealed.
    load_signer
        Returns what signs the receipts of deletions.
    check_spec
        Raises for a bank that the service could not serve, before it is created.
    shard
        Settings of the shards, for what clients are told; None = the defaults.
    recycles
        Whether processes that held what was deleted end before a deletion is acknowledged.
    end_process
        Ends this one; None = it cannot be started again, and lives on.
    check_ours
        Raises where another service has taken the bank over; asked before every call.
    load_trusted_keys
        Reads the keys of which one must have signed a pack that is imported, when a bank is about to be
        served; None of it = any pack is taken.
    """

    # `_lock` makes creation and opening happen once; `_served` is replaced whole.

    def __init__(
        self,
        bank_url: str,
        start_fleet: StartFleet,
        *,
        keyring_url: str = "",
        load_signer: Callable[[], Signer],
        check_spec: Callable[[BankSpec], None] = lambda spec: None,
        shard: ShardConfig | None = None,
        recycles: bool = True,
        end_process: Callable[[], None] | None = None,
        check_ours: Callable[[], None] = lambda: None,
        load_trusted_keys: Callable[[], TrustedKeys | None] = lambda: None,
    ) -> None:
        self._bank_url = bank_url
        self._keyring_url = keyring_url
        self._check_spec = check_spec
        self._check_ours = check_ours
        self._load_trusted_keys = load_trusted_keys
        self._start_fleet = start_fleet
        self._load_signer = load_signer
        self._recycles = recycles
        self._end_process = end_process if recycles else None
        self._shard = shard or ShardConfig()
        self._lock = threading.Lock()
        self._served: _Served | None = None
        self._waiting_for_bank = False

    def open(self, *, insist: bool = True) -> bool:
        """Serve the bank if there is one; return whether there is.

        Parameters
        ----------
        insist
            Whether all its shards must serve then, and all that was under way be settled. Otherwise
            those that do are served, and the next operation settles it.

        Raises
        ------
        MembankError
            What keeps the bank or a shard from being opened.
        """
        with self._lock:
            if self._served is None:
                try:
                    bank = self._open_bank()
                except NotFoundError as err:
                    if err.reason is not Reason.NOT_A_BANK:
                        raise
                    self._waiting_for_bank = True
                    return False
                self._served = self._serve(bank, insist=insist)
            return True

    @property
    def waits_for_bank(self) -> bool:
        """Whether there was no bank when it was opened, and none has been created since."""
        return self._waiting_for_bank and self._served is None

    @property
    def has_bank(self) -> bool:
        """Whether a bank is served."""
        return self._served is not None

    @property
    def revision(self) -> int:
        """Newest committed revision; 0 without a bank."""
        return 0 if self._served is None else self._served.log.committed.revision

    @property
    def held_up(self) -> str:
        """What keeps every transaction waiting, and what to do; empty = nothing known."""
        return "" if self._served is None else self._served.coordinator.held_up

    def info(self) -> BankInfo:
        """Return what clients must know before their first fetch."""
        served = self._require()
        record = served.log.committed
        return BankInfo(
            spec=served.bank.spec,
            revision=record.revision,
            placement=served.fleet.placement(),
            tree_revision=record.tree_revision,
            removal_revision=record.removal_revision,
            server_version=server_version(),
            durability=self._shard.durability,
            ship_every_s=self._shard.ship_every_s,
        )

    def tree(self) -> bytes:
        """Return the tree document in force."""
        served = self._require()
        _, document = served.log.read_in_force(
            lambda record: served.trees.read_bytes(record.tree_revision)
        )
        return document

    def create_bank(self, request: AdminRequest, spec: BankSpec, tree: bytes) -> BankSpec:
        """Create the bank and serve it."""
        document = decode_tree(tree, key="of the request") if tree else None
        self._check_ours()
        self._check_spec(spec)
        digest = _creation_sha256(request, spec, document)
        with self._lock:
            if self._served is None:
                bank = self._create(request, spec, document, digest)
                self._served = self._serve(bank, insist=True)
                return self._served.bank.spec
            served = self._served
        if _is_made_by(served.bank, request, digest):
            return served.bank.spec
        raise AlreadyExistsError(
            f"this service serves the bank {served.bank.spec.name!r} already; start another one "
            "for a new bank",
            reason=Reason.BANK_EXISTS,
            metadata={"bank": served.bank.spec.name},
        )

    def _create(
        self, request: AdminRequest, spec: BankSpec, document: TreeDocument | None, digest: str
    ) -> Bank:
        try:
            return Bank.create(
                self._bank_url,
                spec,
                keyring=self._keyring_url,
                tree=document,
                principal=request.principal,
                request_id=request.request_id,
                request_sha256=digest,
            )
        except AlreadyExistsError:
            bank = self._open_bank()
            if not _is_made_by(bank, request, digest):
                raise
            # By this very request, but then its shards did not start.
            return bank

    def _open_bank(self) -> Bank:
        return Bank.open(self._bank_url, keyring=self._keyring_url)

    def operations(self) -> BankAdmin:
        """Return the operations of the bank."""
        return self._require().operations

    def _require(self) -> _Served:
        self._check_ours()
        if self._served is not None:
            return self._served
        if not self._waiting_for_bank:
            raise UnavailableError("the service is starting; retry")
        raise NotFoundError(
            f"this service was started where no bank is, at {self._bank_url}: create one through it "
            "(BankClient.create_bank), or stop it, run `membank create`, and start it again",
            reason=Reason.UNKNOWN_BANK,
            metadata={"bank": self._bank_url},
        )

    def _serve(self, bank: Bank, *, insist: bool) -> _Served:
        # Before anything is started that would have to be ended again.
        trusted_keys = self._load_trusted_keys()
        signer = self._load_signer()
        fleet = self._start_fleet(bank.spec, insist=insist)
        with ExitStack() as undone:
            shards = ShardGroup(bank.spec, fleet)
            undone.callback(shards.close)
            served = self._over(bank, fleet, shards, signer, trusted_keys, insist=insist)
            undone.pop_all()
        return served

    def _over(
        self,
        bank: Bank,
        fleet: Fleet,
        shards: ShardGroup,
        signer: Signer,
        trusted_keys: TrustedKeys | None,
        *,
        insist: bool,
    ) -> _Served:
        """Return all there is over the shards of a bank, with what was under way settled."""
        log, trees = RevisionLog(bank), TreeStore(bank)
        receipts = ReceiptDesk(
            bank,
            shards,
            log=log,
            signer=signer,
            recycler=_FleetRecycler(fleet) if self._recycles else NoRecycler(Recycling.OFF),
            end_process=self._end_process,
        )
        coordinator = Coordinator(bank, shards, log=log, trees=trees, receipts=receipts)
        # Operations begin with settling what is left. Waiting here for a shard that is away or
        # closed would keep the others from being served.
        if insist:
            coordinator.recover()
        elif fleet.all_serve():
            _try_to_recover(coordinator)
        operations = BankOperations(
            bank,
            shards,
            coordinator,
            log=log,
            trees=trees,
            signer=signer,
            trusted_keys=trusted_keys,
        )
        return _Served(bank, fleet, log, trees, coordinator, operations)


def _try_to_recover(coordinator: Coordinator) -> None:
    try:
        coordinator.recover()
    except MembankError as err:
        _LOG.warning("what was under way is settled by the next operation: %s", err)


def _creation_sha256(request: AdminRequest, spec: BankSpec, tree: TreeDocument | None) -> str:
    asked = {
        "spec": spec_to_json(spec),
        "tree_sha256": None if tree is None else hashlib.sha256(encode_tree(tree)).hexdigest(),
    }
    return request_sha256(request.request_id, "create", asked)


def _is_made_by(bank: Bank, request: AdminRequest, digest: str) -> bool:
    """Say whether `request` made the bank; raise where its id made one, and it asks for another."""
    first = bank.record(0)
    if first is None or not request.request_id or first.request_id != request.request_id:
        return False
    if first.detail.get(REQUEST_SHA256, digest) != digest:
        raise reused(request.request_id, first)
    return True
