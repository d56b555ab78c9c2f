"""How findings are collected: listed up to a limit, counted beyond it, confirmed by a second look."""

from __future__ import annotations

from pathlib import Path

from membank.bank_service.fsck import Finding, FindingKind, Severity, check_bank
from membank.bank_service.fsck.report import FindingLog
from membank.bank_service.store import LocalObjects


def finding(kind: FindingKind, number: int) -> Finding:
    return Finding(kind=kind, key=f"key {number}", problem="p", remedy="r")


def log_of(kind: FindingKind, numbers: range, max_listed: int = 3) -> FindingLog:
    log = FindingLog(max_listed)
    log.extend(finding(kind, number) for number in numbers)
    return log


def test_the_rest_is_counted() -> None:
    log = log_of(FindingKind.SLOT_MISSING, range(10))
    assert [f.key for f in log.listed] == ["key 0", "key 1", "key 2"]
    assert log.counts[FindingKind.SLOT_MISSING] == 10
    assert not log.is_complete


def test_a_finding_of_two_partitions_is_one() -> None:
    log = log_of(FindingKind.RECORD_MISSING, range(1))
    log.merge(log_of(FindingKind.RECORD_MISSING, range(1)))
    assert log.counts[FindingKind.RECORD_MISSING] == 1


def test_logs_add_up() -> None:
    log = log_of(FindingKind.SLOT_MISSING, range(2))
    log.merge(log_of(FindingKind.SLOT_MISSING, range(10, 17)))
    log.merge(log_of(FindingKind.LEFTOVER, range(1)))
    assert [f.key for f in log.listed] == ["key 0", "key 1", "key 10", "key 0"]
    assert log.counts == {FindingKind.SLOT_MISSING: 9, FindingKind.LEFTOVER: 1}


def test_what_a_second_look_does_not_find_was_nothing() -> None:
    first = log_of(FindingKind.SLOT_MISSING, range(3))
    first.add(finding(FindingKind.LEFTOVER, 0))
    confirmed = first.confirmed_by(log_of(FindingKind.SLOT_MISSING, range(2, 5)))
    assert [(f.kind, f.key) for f in confirmed.listed] == [
        (FindingKind.SLOT_MISSING, "key 2"),
        (FindingKind.LEFTOVER, "key 0"),
    ]
    assert confirmed.counts == {FindingKind.SLOT_MISSING: 1, FindingKind.LEFTOVER: 1}
    assert first.confirmed_by(FindingLog()).counts == {FindingKind.LEFTOVER: 1}


def test_too_many_to_compare_are_counted_by_the_second_look() -> None:
    first = log_of(FindingKind.SLOT_MISSING, range(10))
    confirmed = first.confirmed_by(log_of(FindingKind.SLOT_MISSING, range(8, 15)))
    assert confirmed.counts == {FindingKind.SLOT_MISSING: 7}
    assert len(confirmed.listed) == 3
    assert first.confirmed_by(FindingLog()).counts == {}


def test_many_missing_slots_are_counted_in_full(root: Path) -> None:
    paths = sorted(root.glob("partitions/*/*/*/c.*"))
    for folder in range(4):
        # Named by nobody: one note for each level of a partition.
        (root / f"partitions/0000/level-1/weight/c.{80 + folder}.0.0.0.0").write_bytes(b"")
    for path in paths:
        path.unlink()
    report = check_bank(LocalObjects(root))
    assert report.count(Severity.DAMAGE) == len(paths)
    assert report.counts[FindingKind.SLOT_UNNAMED] == 1
    assert report.has_damage
    assert not report.is_clean
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=list(Severity).index)


def test_progress_goes_up_to_the_number_of_objects(template: Path) -> None:
    seen: list[tuple[int, int]] = []
    objects = LocalObjects(template)
    check_bank(objects, on_progress=lambda done, total: seen.append((done, total)))
    total = len(objects.list(""))
    assert {known for _, known in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert len({done for done, _ in seen}) > total / 2
