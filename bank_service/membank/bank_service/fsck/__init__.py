"""A check of everything that a bank consists of, by reading alone: `check_bank`; of the log: `verify_audit`.

Modules: `checker` (the check as a whole), `view` (one look at a bank), one module for each kind of
thing: `document`, `chain`, `receipts`, `trees`, `snapshots`, `manifests` with `retention`, `arrays`, `slots`,
`segments`, `journals` with `replay`, `removal`, `strays`; `audit`
(the log alone); `report` (what comes out).
"""

from membank.bank_service.fsck.audit import AuditReport, Head, head_of, verify_audit
from membank.bank_service.fsck.checker import check_bank
from membank.bank_service.fsck.report import Checked, Finding, FindingKind, FsckReport, Severity

__all__ = [
    "AuditReport",
    "Checked",
    "Finding",
    "FindingKind",
    "FsckReport",
    "Head",
    "Severity",
    "check_bank",
    "head_of",
    "verify_audit",
]
