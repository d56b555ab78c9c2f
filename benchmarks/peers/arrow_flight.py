"""Arrow Flight: a block is a record batch, a fetch DoGet, a push DoPut with Adagrad in the server.

Streams are handed to `RecordBatchStream`, whose transfer runs in C++ without Python's lock
(https://arrow.apache.org/docs/python/generated/pyarrow.flight.RecordBatchStream.html); client and
calls as in https://arrow.apache.org/docs/python/flight.html.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.peers.blocks import Array
from benchmarks.peers.contestant import (
    About,
    ClientBase,
    Contestant,
    NotRunError,
    Reach,
    version_of,
)
from benchmarks.peers.server_process import ServerProcess

_READY = "listening on "


class FlightServer:
    """A Flight server written with pyarrow."""

    name = "arrow flight"

    def __init__(self) -> None:
        self._process: ServerProcess | None = None

    def about(self) -> About:
        # docstring inherited
        if find_spec("pyarrow") is None:
            raise NotRunError("pyarrow is not installed")
        return About(
            version=f"pyarrow {version_of('pyarrow')}",
            setup="one column of float32, a batch per block; settings as they come",
            docs="https://arrow.apache.org/docs/python/flight.html",
            optimizer="Adagrad in DoPut of the server, torch's fused kernel",
        )

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        self._process = ServerProcess.of_module(
            "arrow_flight", [], folder / "server.log", environment
        )
        return f"grpc://127.0.0.1:{self._process.wait_for_line(_READY)}"

    def stop(self) -> None:
        # docstring inherited
        if self._process is not None:
            self._process.stop()


class FlightClient(ClientBase):
    """A Flight client.

    Parameters
    ----------
    address
        URL of the server.
    """

    def __init__(self, address: str) -> None:
        from pyarrow import flight

        self._flight = flight.connect(address)

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        for key, array in blocks.items():
            self._put(["load", key], array)

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        from pyarrow import flight

        table = self._flight.do_get(flight.Ticket(json.dumps(keys).encode())).read_all()
        # A view of what Arrow received; a chunk is a batch, which is a block.
        return [chunk.to_numpy() for chunk in table.column(0).chunks]

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        self._put(["push", key], gradient)

    def close(self) -> None:
        # docstring inherited
        self._flight.close()

    def _put(self, path: list[str], array: Array) -> None:
        import pyarrow
        from pyarrow import flight

        batch = pyarrow.record_batch([pyarrow.array(array.reshape(-1))], names=["block"])
        descriptor = flight.FlightDescriptor.for_path(*path)
        writer, answers = self._flight.do_put(descriptor, batch.schema)
        with writer:
            writer.write_batch(batch)
            writer.done_writing()
            answers.read()


def _serve() -> None:
    import pyarrow
    import torch
    from pyarrow import flight

    from benchmarks.peers.rules import Adagrad

    schema = pyarrow.schema([("block", pyarrow.float32())])

    class Blocks(flight.FlightServerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__("grpc://127.0.0.1:0")
            self._weights: dict[str, Array] = {}
            self._adagrad = Adagrad()

        def do_get(self, context: object, ticket: flight.Ticket) -> flight.RecordBatchStream:
            batches = [
                pyarrow.record_batch([pyarrow.array(self._weights[key])], schema=schema)
                for key in json.loads(ticket.ticket)
            ]
            return flight.RecordBatchStream(pyarrow.Table.from_batches(batches))

        def do_put(
            self,
            context: object,
            descriptor: flight.FlightDescriptor,
            reader: flight.MetadataRecordBatchReader,
            writer: flight.FlightMetadataWriter,
        ) -> None:
            kind, key = (part.decode() for part in descriptor.path)
            values = reader.read_chunk().data.column(0).to_numpy()
            if kind == "load":
                self._weights[key] = values.copy()
            else:
                weight = torch.from_numpy(self._weights[key])
                # A read-only view would make torch warn; nothing writes into it.
                self._adagrad.step(key, weight, torch.frombuffer(values.data, dtype=torch.float32))
            writer.write(b"done")

    with Blocks() as server:
        print(_READY + str(server.port), flush=True)
        server.serve()


def contestants() -> list[Contestant]:
    """Return Arrow Flight."""
    return [
        Contestant(
            name="arrow flight",
            server=FlightServer(),
            connect=lambda access: FlightClient(access.address),
            reach=Reach.NETWORK,
            note="DoGet, read_all; the arrays are views of what Arrow received",
            many_clients=True,
        )
    ]


if __name__ == "__main__":
    import warnings

    # Of views that are read-only, which nothing writes into.
    warnings.filterwarnings("ignore", message=".*not writable.*")
    _serve()
