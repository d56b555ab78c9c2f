"""Corpora: documents and the facts they state, tokenizer, and packing into sequences."""

from membank.trainer.corpus._carried import CARRIED, CarriedSelection, load_corpus
from membank.trainer.corpus._document import Corpus, Document, Fact
from membank.trainer.corpus._factbook import FACTBOOK_FIELDS, FactbookField
from membank.trainer.corpus._packing import IGNORE, NO_LEAF, PackedSequences, pack_sequences
from membank.trainer.corpus._tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer

__all__ = [
    "CARRIED",
    "END_OF_TEXT",
    "FACTBOOK_FIELDS",
    "IGNORE",
    "NO_LEAF",
    "CarriedSelection",
    "Corpus",
    "Document",
    "Fact",
    "FactbookField",
    "PackedSequences",
    "Tokenizer",
    "load_corpus",
    "pack_sequences",
    "train_tokenizer",
]
