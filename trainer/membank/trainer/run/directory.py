"""What a run keeps on disk, so that every later command and every rerun finds it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from membank.trainer.corpus import Corpus, Tokenizer, load_corpus
from membank.trainer.model import Anchor
from membank.trainer.run.deleted import DeletedDocuments
from membank.trainer.training import anchor_fingerprint, load_anchor
from membank.trainer.training.files import write_atomically
from membank.wire.errors import FailedPreconditionError, NotFoundError, Reason
from membank.wire.format import TreeDocument, decode_tree, encode_tree


class RunDirectory:
    """The files of one run; each is written whole or not at all.

    Parameters
    ----------
    path
        The directory; it is made when something is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config_file(self) -> Path:
        """Resolved configuration, JSON."""
        return self.path / "run.json"

    @property
    def prepared_file(self) -> Path:
        """Sizes and scores of what was prepared, JSON."""
        return self.path / "prepared.json"

    @property
    def tokenizer_file(self) -> Path:
        """Tokenizer."""
        return self.path / "tokenizer.json"

    @property
    def tree_file(self) -> Path:
        """Tree document: retriever and labels."""
        return self.path / "tree.safetensors"

    @property
    def leaves_file(self) -> Path:
        """Leaf of each document of the corpus, JSON list in the order of the corpus."""
        return self.path / "leaves.json"

    @property
    def anchor_sequences_file(self) -> Path:
        """Packed sequences of stage 1."""
        return self.path / "sequences-anchor.safetensors"

    @property
    def memory_sequences_file(self) -> Path:
        """Packed sequences of stage 2, each of one leaf."""
        return self.path / "sequences-memory.safetensors"

    @property
    def anchor_file(self) -> Path:
        """The trained anchor."""
        return self.path / "anchor.safetensors"

    @property
    def stage1_dir(self) -> Path:
        """Checkpoint and losses of stage 1."""
        return self.path / "stage1"

    @property
    def stage2_dir(self) -> Path:
        """Positions and losses of the workers of stage 2."""
        return self.path / "stage2"

    @property
    def generic_dir(self) -> Path:
        """The generic memory (the control) and its losses."""
        return self.path / "generic"

    @property
    def bank_dir(self) -> Path:
        """The bank, unless another URL was given."""
        return self.path / "bank"

    @property
    def deleted_documents(self) -> DeletedDocuments:
        """Documents that were deleted from banks of this run."""
        return DeletedDocuments(self.deletion_dir / "deleted.json")

    @property
    def edits_dir(self) -> Path:
        """Log of edits, with what each block held before them."""
        return self.path / "edits"

    @property
    def deletion_dir(self) -> Path:
        """Deletions of documents: those under way, and accounts of those that are done."""
        return self.path / "deletion"

    @property
    def is_trained(self) -> bool:
        """Whether stage 1 has begun, after which tokenizer and tree must stay."""
        return self.anchor_file.is_file() or self.stage1_dir.is_dir()

    def write_json(self, file: Path, value: object) -> None:
        """Write a JSON file of this run."""
        write_atomically(file, json.dumps(value, indent=1, default=str).encode())

    def read_json(self, file: Path) -> object:
        """Read a JSON file of this run.

        Raises
        ------
        NotFoundError
            If it is not there yet.
        """
        return json.loads(self._existing(file).read_text())

    def save_tree(self, tree: TreeDocument) -> None:
        """Write the tree document."""
        write_atomically(self.tree_file, encode_tree(tree))

    def tree(self) -> TreeDocument:
        """Read the tree document."""
        return decode_tree(self._existing(self.tree_file).read_bytes(), key=str(self.tree_file))

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer."""
        return Tokenizer.load(self._existing(self.tokenizer_file))

    def corpus(self) -> Corpus:
        """Load the corpus that the run was prepared from."""
        name = self._config_value("corpus")
        return open_corpus(str(name))

    def anchor(self) -> Anchor:
        """Load the trained anchor, frozen."""
        return load_anchor(self._existing(self.anchor_file))

    def fingerprint(self) -> str:
        """Return the digest of anchor and tokenizer that this run's blocks are trained for."""
        text = anchor_fingerprint(self.anchor()) + self.tokenizer().fingerprint
        return hashlib.sha256(text.encode()).hexdigest()

    def check_fingerprint(self, bank_fingerprint: str) -> None:
        """Refuse a bank whose blocks belong to another anchor or tokenizer.

        Raises
        ------
        FailedPreconditionError
            If the bank is bound to something else.
        """
        if bank_fingerprint and bank_fingerprint != self.fingerprint():
            raise FailedPreconditionError(
                f"the bank's blocks were trained for another anchor or tokenizer than {self.path} "
                "holds; give the run directory that the bank was created from",
                reason=Reason.FINGERPRINT_MISMATCH,
                metadata={"run": str(self.path)},
            )

    def _config_value(self, name: str) -> object:
        config = self.read_json(self.config_file)
        assert isinstance(config, dict)  # we wrote it
        return config[name]

    def _existing(self, file: Path) -> Path:
        if not file.is_file():
            raise NotFoundError(
                f"{file} does not exist; prepare the run first: membank tree, membank train",
                reason=Reason.OBJECT_MISSING,
                metadata={"file": str(file)},
            )
        return file


def open_corpus(name: str) -> Corpus:
    """Return a carried corpus by name, or the one in a JSONL file at a path or URL."""
    if name in ("fast", "demo", "full"):
        return load_corpus(name)
    return Corpus.from_jsonl(name)
