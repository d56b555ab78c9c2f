"""Benchmarks that measure the store beside the plain thing it stands for, in one run."""

from membank.bank_service.bench.contract import Bench, Judged, Pair, Row, Target
from membank.bank_service.bench.measure import interleave, rates
from membank.bank_service.bench.scale import FULL, QUICK, Scale
from membank.bank_service.bench.suite import report, run_benches, select, store_benches

__all__ = [
    "FULL",
    "QUICK",
    "Bench",
    "Judged",
    "Pair",
    "Row",
    "Scale",
    "Target",
    "interleave",
    "rates",
    "report",
    "run_benches",
    "select",
    "store_benches",
]
