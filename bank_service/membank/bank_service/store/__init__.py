"""What a bank is made of on storage: objects, zarr arrays of slots, journals, the bank's documents.

Modules: `objects` (the seam to storage), `local_objects`, `s3_objects` and `fsspec_objects` (implementations),
`sealed_objects` (one that encrypts what it keeps in two others),
`arrays` (zarr metadata and slots), `journal` (the redo log, a package), `bank` (documents of a bank), `records` (its
chain of revisions).
"""

from membank.bank_service.store.arrays import SlotArrays
from membank.bank_service.store.bank import Bank
from membank.bank_service.store.fsspec_objects import FsspecObjects
from membank.bank_service.store.journal import Journal, LocalJournal, Ownership
from membank.bank_service.store.local_objects import LocalObjects
from membank.bank_service.store.objects import Data, ObjectStore, probe_create_only, publish
from membank.bank_service.store.open_objects import open_objects
from membank.bank_service.store.s3_account import S3Config
from membank.bank_service.store.s3_objects import S3Objects
from membank.bank_service.store.sealed_objects import SealedObjects

__all__ = [
    "Bank",
    "Data",
    "FsspecObjects",
    "Journal",
    "LocalJournal",
    "LocalObjects",
    "ObjectStore",
    "Ownership",
    "S3Config",
    "S3Objects",
    "SealedObjects",
    "SlotArrays",
    "open_objects",
    "probe_create_only",
    "publish",
]
