"""The redo log of a partition.

Modules: `contract` (what every journal promises), `frames` (its bytes, and how they are checked),
`local` (segments on the owner's disk), `segment_file` (one of them), `spares` (files to be written
over), `log_file` (how they are written), `objects` (batches in the bank's own storage),
`object_chain` (how those continue each other), `shipped` (a local journal with a copy in the bank's
storage), `backlog` (what is still to be shipped).
"""

from membank.bank_service.store.journal.contract import (
    Checked,
    Frame,
    FrameKind,
    Journal,
    Ownership,
    Payload,
    TornTail,
)
from membank.bank_service.store.journal.frames import (
    MAX_FRAME_BYTES,
    SegmentHead,
    SegmentScan,
    check_chain,
    content_frames,
    scan,
)
from membank.bank_service.store.journal.local import LocalJournal
from membank.bank_service.store.journal.log_file import LogFile, PosixLogFile
from membank.bank_service.store.journal.object_chain import check_object_chain
from membank.bank_service.store.journal.objects import ObjectJournal
from membank.bank_service.store.journal.shipped import ShipLag, ShippedJournal

__all__ = [
    "MAX_FRAME_BYTES",
    "Checked",
    "Frame",
    "FrameKind",
    "Journal",
    "LocalJournal",
    "LogFile",
    "ObjectJournal",
    "Ownership",
    "Payload",
    "PosixLogFile",
    "SegmentHead",
    "SegmentScan",
    "ShipLag",
    "ShippedJournal",
    "TornTail",
    "check_chain",
    "check_object_chain",
    "content_frames",
    "scan",
]
