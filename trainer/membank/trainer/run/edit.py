"""The editor of a run: its anchor, tokenizer, training sequences and log of edits."""

from __future__ import annotations

from pathlib import Path

from membank.trainer.editing import Answers, EditConfig, EditedBank, EditLog, Editor, Notice
from membank.trainer.editing.staging import ReplaySequences
from membank.trainer.run.directory import RunDirectory
from membank.trainer.training import load_sequences


def run_editor(
    run: Path | RunDirectory,
    bank: EditedBank,
    *,
    config: EditConfig | None = None,
    log: EditLog | None = None,
    notice: Notice = lambda _: None,
) -> Editor:
    """Return an editor of the bank that belongs to a run.

    Parameters
    ----------
    run
        The run, or its directory.
    bank
        The served bank.
    config
        How to train; None = the defaults.
    log
        Where edits are logged; None = in the run's directory.
    notice
        Told what is being done.

    Raises
    ------
    FailedPreconditionError
        If the bank was made for another anchor or tokenizer.
    NotFoundError
        If the run is not prepared and trained.
    """
    directory = RunDirectory(run) if isinstance(run, Path) else run
    directory.check_fingerprint(bank.info().spec.fingerprint)
    config = config or EditConfig()
    file = directory.memory_sequences_file
    # They may have been removed to save space; then earlier edits and given neighbours guard alone.
    replay = ReplaySequences(load_sequences(file) if file.is_file() else None)
    return Editor(
        bank,
        Answers(directory.anchor(), directory.tokenizer(), ending=config.ending),
        log or EditLog(directory.edits_dir),
        config=config,
        replay=replay,
        notice=notice,
    )
