"""A reader of banks written from docs/format.md alone: no code of membank, no zarr, no torch."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import numpy.typing as npt

from foreign_journal import ForeignUpdate, read_updates

Ref = tuple[int, int]
Manifest = tuple[dict[str, Any], dict[Ref, tuple[Any, ...]]]
"""Head and entries."""
NO_MANIFEST: dict[str, Any] = {"epoch": 0, "owner": "", "nonce": "", "lsn": 0}
"""What stands for one in a partition that nobody has changed."""
NO_SLOT = 0xFFFFFFFF
STATE_ROLES = {"adamw": ["exp_avg", "exp_avg_sq"], "adagrad": ["sum_sq"], "sgd": ["momentum"]}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
A = [-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02,
     1.383577518672690e02, -3.066479806614716e01, 2.506628277459239e00]  # fmt: skip
B = [-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02,
     6.680131188771972e01, -1.328068155288572e01, 1.0]  # fmt: skip


@dataclass(frozen=True)
class ForeignBlock:
    """A block as this reader understands it."""

    version: int
    state: int
    step: int
    arrays: Mapping[str, bytes]
    """Bytes per role; empty for a deleted block."""


def read_bank(root: Path, revision: int | None = None) -> dict[Ref, ForeignBlock]:
    """Return every block of the bank in `root`; now, or at the beginning of a revision."""
    bank = _Bank(root)
    found = {}
    for partition in range(bank.spec["num_partitions"]):
        head, entries = (
            bank.newest_manifest(partition)
            if revision is None
            else bank.manifest_at(revision, partition)
        )
        for ref in bank.refs():
            if bank.partition_of(*ref) == partition:
                found[ref] = bank.block(entries, partition, *ref)
        if revision is None:
            folder = root / f"partitions/{partition:04d}"
            for update in read_updates(folder, head):
                bank.apply(update, found)
    return found


class _Bank:
    def __init__(self, root: Path) -> None:
        self.root = root
        document = json.loads((root / "bank.json").read_bytes())
        assert document["format"] == 1
        self.spec: dict[str, Any] = document["spec"]
        text = json.dumps(self.spec, sort_keys=True, separators=(",", ":"))
        assert google_crc32c.value(text.encode()) == document["crc32c"]
        self.records = self._read_records()
        optimizer = self.spec["optimizer"]
        plain = optimizer["kind"] == "sgd" and not optimizer["beta1"]
        self.roles = ["weight", *([] if plain else STATE_ROLES[optimizer["kind"]])]

    def _read_records(self) -> list[dict[str, Any]]:
        records, previous = [], ""
        for number, path in enumerate(sorted((self.root / "revisions").iterdir())):
            data = path.read_bytes()
            document = json.loads(data)
            record = document["record"]
            text = json.dumps(record, sort_keys=True, separators=(",", ":"))
            assert hashlib.sha256(text.encode()).hexdigest() == document["sha256"]
            assert (record["revision"], record["previous_sha256"]) == (number, previous)
            previous = hashlib.sha256(data).hexdigest()
            records.append(record)
        return records

    def num_clusters(self, level: int) -> int:
        return math.prod(item["fan_out"] for item in self.spec["levels"][:level])

    def partition_of(self, level: int, cluster: int) -> int:
        while level > self.spec["partition_level"]:
            cluster //= self.spec["levels"][level - 1]["fan_out"]
            level -= 1
        return int(cluster % self.spec["num_partitions"])

    def refs(self) -> Iterator[Ref]:
        for level in range(1, len(self.spec["levels"]) + 1):
            for cluster in range(self.num_clusters(level)):
                yield level, cluster

    def newest_manifest(self, partition: int) -> Manifest:
        folder = self.root / f"partitions/{partition:04d}/manifests"
        counting = []
        for path in folder.iterdir() if folder.exists() else ():
            head, entries = self._manifest(path)
            record = self.records[head["revision"]] if self._decided(head["revision"]) else None
            if not head["prepared"] or (
                record is not None
                and record["committed"]
                and record["manifests"].get(str(partition)) == head["number"]
            ):
                counting.append((head["revision"], head["number"], head, entries))
        return max(counting, key=lambda item: item[:2])[2:] if counting else (NO_MANIFEST, {})

    def manifest_at(self, revision: int, partition: int) -> Manifest:
        for record in reversed(self.records[: revision + 1]):
            if record["committed"] and str(partition) in record["manifests"]:
                number = record["manifests"][str(partition)]
                name = f"partitions/{partition:04d}/manifests/{number:010d}"
                return self._manifest(self.root / name)
        return NO_MANIFEST, {}

    def _decided(self, revision: int) -> bool:
        return revision < len(self.records)

    def _manifest(self, path: Path) -> Manifest:
        data = path.read_bytes()
        assert data[:8] == b"MBMANIF1"
        assert google_crc32c.value(data[:-4]) == struct.unpack("<I", data[-4:])[0]
        (length,) = struct.unpack_from("<I", data, 8)
        head = json.loads(data[12 : 12 + length])
        assert head["number"] == int(path.name)
        entries = {}
        for index in range(head["num_entries"]):
            offset = 12 + length + 40 * index
            level, state, _, cluster, slot, step, version, *rest = struct.unpack_from(
                "<BBHIIIQ4I", data, offset
            )
            entries[level, cluster] = (state, slot, step, version, rest[:3])
        return head, entries

    def block(
        self, entries: Mapping[Ref, tuple[Any, ...]], partition: int, level: int, cluster: int
    ) -> ForeignBlock:
        state, slot, step, version, crcs = entries.get(
            (level, cluster), (1, NO_SLOT, 0, 0, [0, 0, 0])
        )
        arrays = {}
        if slot != NO_SLOT:
            for role, crc in zip(self.roles, crcs, strict=False):
                name = f"partitions/{partition:04d}/level-{level}/{role}/c.{slot}.0.0.0.0"
                zeros = bytes(4 * math.prod(self._initial(level, cluster).shape))
                if not (self.root / name).exists() and role != "weight":
                    assert google_crc32c.value(zeros) == crc
                    arrays[role] = zeros
                    continue
                chunk = (self.root / name).read_bytes()
                assert google_crc32c.value(chunk[:-4]) == crc
                assert struct.unpack("<I", chunk[-4:])[0] == crc
                arrays[role] = chunk[:-4]
        elif state != 3:
            weight = self._initial(level, cluster)
            arrays = {role: bytes(4 * weight.size) for role in self.roles}
            arrays["weight"] = weight.tobytes()
        return ForeignBlock(version, state, step, arrays)

    def apply(self, update: ForeignUpdate, blocks: dict[Ref, ForeignBlock]) -> None:
        """Apply one update of a journal to `blocks`."""
        offset = 0
        for level, cluster, version, step, _, dtype, crcs in update.head["blocks"]:
            before = blocks[level, cluster]
            arrays = {}
            if update.is_image:
                for role in self.roles:
                    num_bytes = len(before.arrays[role])
                    arrays[role] = update.arrays[offset : offset + num_bytes]
                    offset += num_bytes
            else:
                num_elements = len(before.arrays["weight"]) // self._dtype("weight")().itemsize
                gradient = np.frombuffer(update.arrays, DTYPES[dtype], num_elements, offset)
                offset += gradient.nbytes
                rate = self.spec["levels"][level - 1]["learning_rate"] * update.head["scale"]
                arrays = self._step(before.arrays, gradient.astype(np.float32), rate)
            assert before.version + 1 == version
            assert [google_crc32c.value(arrays[role]) for role in self.roles] == crcs
            blocks[level, cluster] = ForeignBlock(version, before.state, step, arrays)

    def _step(
        self, before: Mapping[str, bytes], gradient: npt.NDArray[Any], rate: float
    ) -> dict[str, bytes]:
        optimizer = self.spec["optimizer"]
        # The others round more than once per element, in the order of the kernel that is named.
        assert (optimizer["kind"], optimizer["weight_decay"]) == ("sgd", 0)
        after = {}
        if "momentum" in self.roles:
            momentum = np.frombuffer(before["momentum"], np.float32)
            gradient = np.float32(optimizer["beta1"]) * momentum + gradient
            after["momentum"] = gradient.tobytes()
        weight = np.frombuffer(before["weight"], self._dtype("weight")).astype(np.float32)
        updated = weight - np.float32(rate) * gradient
        return {"weight": updated.astype(self._dtype("weight")).tobytes(), **after}

    def _dtype(self, role: str) -> Any:
        return DTYPES[self.spec["dtype"]] if role == "weight" else np.float32

    def _initial(self, level: int, cluster: int) -> npt.NDArray[Any]:
        layers, width = self.spec["num_layers"], self.spec["width"]
        rows = self.spec["levels"][level - 1]["block_width"]
        count = layers * 2 * rows * width
        key = self.spec["init_seed"] << 64 | level << 56 | cluster
        raw = np.random.Philox(key=key).random_raw(count)
        u = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        q = (u - 0.5) * (1 - 2 * 0.02425)
        z = q * np.polyval(A, q * q) / np.polyval(B, q * q)
        weight = np.zeros((layers, 3, rows, width), np.float32)
        shaped = (z * self.spec["init_std"]).astype(np.float32)
        weight[:, :2] = shaped.reshape(layers, 2, rows, width)
        return weight.astype(DTYPES[self.spec["dtype"]])
