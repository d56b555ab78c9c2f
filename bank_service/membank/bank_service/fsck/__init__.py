"""A check of everything that a bank consists of, by reading alone: `check_bank`.

Modules: `checker` (the check as a whole), `view` (one look at a bank), one module for each kind of
thing: `document`, `chain`, `trees`, `snapshots`, `manifests` with `retention`, `arrays`, `slots`,
`segments`, `journals` with `replay`, `removal`, `strays`; `report` (what comes out).
"""

from membank.bank_service.fsck.checker import check_bank
from membank.bank_service.fsck.report import Checked, Finding, FindingKind, FsckReport, Severity

__all__ = ["Checked", "Finding", "FindingKind", "FsckReport", "Severity", "check_bank"]
