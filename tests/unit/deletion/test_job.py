"""Deleting documents: what is left is as if they had never been seen, and all else keeps its bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deletion_rig import ONE_THREAD, DeletionRig, trained_on
from membank.trainer.deletion import DeletionConfig, Scope, forecast_deletion
from membank.trainer.finding import NamedDocument
from membank.trainer.finding.influence import InfluenceConfig, measure_loss
from membank.trainer.run import RunDirectory, RunMaterial, load_config
from membank.trainer.training import InProcessMemory, Progress
from membank.wire.errors import ConflictError, CorruptionError, InvalidArgumentError
from membank.wire.spec import BlockRef, BlockState
from tiny_run import SEQ_LEN, make_tiny_run
from tiny_world import World

# One of four documents of leaf 0: leaf 0 and topic 0 are shared.
ONE = (0,)
TOP, LEAF = BlockRef(1, 0), BlockRef(2, 0)
SIBLING = BlockRef(2, 1)
CAREFUL = replace(ONE_THREAD, checkpoint_every_steps=1)


class Killed(Exception):
    """Ends a job in its middle, as a signal would."""


def _kill_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    return on_progress


def test_blocks_elsewhere_keep_their_bits_and_shared_ones_are_trained_anew(
    rig: DeletionRig,
) -> None:
    before = rig.contents()
    report = rig.delete(ONE)
    after = rig.contents()
    assert {ref for ref in before if before[ref] != after[ref]} == {TOP, LEAF}
    assert rig.exchange.calls == ["destroy", "install"]
    assert {ref: rig.bank.held(ref).version for ref in (TOP, LEAF, SIBLING)} == {
        TOP: 2,
        LEAF: 2,
        SIBLING: 0,
    }
    told = report.to_json()
    assert told["phase"] == "done"
    assert told["removed_documents"] == 1


@pytest.mark.slow
def test_a_document_becomes_as_hard_to_predict_as_for_a_bank_that_never_saw_it(
    world: World, rig: DeletionRig, run: RunDirectory
) -> None:
    told = rig.delete(ONE).to_json()
    before, after = (_nats(told[name]) for name in ("loss_before", "loss_after"))
    never = trained_on(world, rig.spec, load_config(run).stage2, without=ONE)
    path = world.paths.holding[0]
    expected = measure_loss(
        world.anchor,
        world.tokenizer,
        [world.documents[0].text],
        [path],
        never.fetch(path),
        rig.spec,
        InfluenceConfig(seq_len=SEQ_LEN),
    ).memory_nats_per_token
    assert expected is not None
    assert after == pytest.approx(expected, abs=0.1)
    assert after > before + 0.15
    # Another document of the leaf, of which nothing was asked, is known as before.
    assert _nats(rig.delete((8,)).to_json()["loss_before"]) < after - 0.15


def _nats(loss: object) -> float:
    assert isinstance(loss, dict)
    return float(loss["memory_nats_per_token"])


@pytest.mark.slow
def test_topics_equal_a_bank_that_never_saw_the_documents_bit_by_bit(
    world: World, rig: DeletionRig
) -> None:
    config = replace(ONE_THREAD, scope=Scope.TOPICS)
    forecast = rig.forecast(ONE, config)
    assert forecast.retraining is not None
    rig.delete(ONE, config)
    # From the start, the same recipe: leaves of topic 0 alone, as nothing else touches its blocks.
    fresh = trained_on(world, rig.spec, forecast.retraining.config, without=ONE, leaves=(0, 1))
    for ref in rig.spec.subtree(TOP):
        (weight,) = fresh.fetch([ref]).weights.values()
        assert rig.contents()[ref] == weight.numpy().tobytes()
    saw_it = trained_on(world, rig.spec, forecast.retraining.config, leaves=(0, 1))
    (weight,) = saw_it.fetch([LEAF]).weights.values()
    assert rig.contents()[LEAF] != weight.numpy().tobytes()


@pytest.mark.slow
def test_paths_do_not_depend_on_what_the_blocks_held(
    world: World, rig: DeletionRig, trained: InProcessMemory, tmp_path: Path
) -> None:
    rig.delete(ONE)
    other = make_tiny_run(tmp_path / "other", world)
    with DeletionRig(world, other, trained) as never:
        # As if stage 2 had never touched them: the result is the same, bit by bit.
        never.forget_content([TOP, LEAF])
        never.delete(ONE)
        assert never.contents() == rig.contents()


@pytest.mark.slow
@pytest.mark.parametrize("num_times", [1, 9])
def test_an_interrupted_training_goes_on_and_gives_the_same_bits(
    world: World, rig: DeletionRig, trained: InProcessMemory, tmp_path: Path, num_times: int
) -> None:
    rig.delete(ONE, CAREFUL)
    other = make_tiny_run(tmp_path / "other", world)
    with DeletionRig(world, other, trained) as stopped:
        before = stopped.contents()
        # Progress is told of the first step of each process, and else by the clock: so each attempt
        # ends after one step more, on a machine of any speed.
        for _ in range(num_times):
            with pytest.raises(Killed):
                stopped.delete(ONE, CAREFUL, on_progress=_kill_at(1))
            assert stopped.contents() == before
        steps: list[int] = []
        stopped.delete(ONE, CAREFUL, on_progress=lambda progress: steps.append(progress.step))
        assert steps[0] == num_times + 1
        assert stopped.contents() == rig.contents()


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["before destroy", "after destroy", "before install", "after install"]
)
def test_a_job_that_dies_around_its_transactions_goes_on(
    world: World, rig: DeletionRig, trained: InProcessMemory, tmp_path: Path, where: str
) -> None:
    rig.delete(ONE)
    other = make_tiny_run(tmp_path / "other", world)
    with DeletionRig(world, other, trained) as stopped:
        stopped.exchange.die_at = where
        with pytest.raises(KeyboardInterrupt):
            stopped.delete(ONE)
        report = stopped.delete(ONE)
        assert stopped.contents() == rig.contents()
        assert stopped.bank.revision == rig.bank.revision
        assert report.to_json()["loss_after"] is not None


def test_damaged_new_blocks_are_found_while_the_old_ones_are_there(rig: DeletionRig) -> None:
    before = rig.contents()
    rig.exchange.die_at = "before destroy"
    with pytest.raises(KeyboardInterrupt):
        rig.delete(ONE)
    staged = rig.forecast(ONE).folder.staged_file
    content = staged.read_bytes()
    staged.write_bytes(content[:-100])
    with pytest.raises(CorruptionError, match="staged"):
        rig.delete(ONE)
    assert (rig.exchange.calls, rig.contents()) == ([], before)


def test_a_dominated_leaf_goes_and_what_is_above_is_trained_on_the_rest(
    rig: DeletionRig, world: World
) -> None:
    rows = [row for row, leaf in enumerate(world.leaves) if leaf == 0]
    before = rig.contents()
    told = rig.delete(rows[:-1]).to_json()
    assert told["deleted_topics"] == ["2/0"]
    assert told["collateral_documents"] == 1
    assert rig.bank.held(LEAF).state is BlockState.DELETED
    assert rig.bank.held(TOP).state is BlockState.ACTIVE
    assert rig.contents()[TOP] != before[TOP]
    others = set(before) - {TOP, LEAF}
    assert all(rig.contents()[ref] == before[ref] for ref in others)


def test_a_topic_of_which_nothing_is_left_needs_no_training(rig: DeletionRig, world: World) -> None:
    rows = [row for row, leaf in enumerate(world.leaves) if leaf in (0, 1)]
    report = rig.delete(rows)
    assert rig.exchange.calls == ["destroy"]
    assert report.to_json()["deleted_topics"] == ["1/0"]
    assert {rig.bank.held(ref).state for ref in rig.spec.subtree(TOP)} == {BlockState.DELETED}
    assert rig.bank.held(BlockRef(1, 1)).state is BlockState.ACTIVE


def test_what_was_deleted_stays_out_of_later_deletions(rig: DeletionRig) -> None:
    rig.delete(ONE)
    plan = rig.forecast((8,)).plan
    assert 0 not in plan.remaining
    assert plan.removed == (8,)
    with pytest.raises(InvalidArgumentError, match="nothing to delete"):
        rig.forecast(ONE, replace(ONE_THREAD, threshold=0.9))


def test_the_same_command_again_says_what_was_done(rig: DeletionRig) -> None:
    first = rig.delete(ONE)
    revision = rig.bank.revision
    assert rig.forecast(ONE).is_done
    assert rig.delete(ONE).figures == first.figures
    assert rig.bank.revision == revision


def test_a_block_that_changes_while_its_successor_is_trained_is_not_overwritten(
    rig: DeletionRig,
) -> None:
    def change(progress: Progress) -> None:
        if progress.step == progress.num_steps:
            rig.bank.held(LEAF).version += 1

    with pytest.raises(ConflictError, match="begins anew"):
        rig.delete(ONE, on_progress=change)
    assert rig.exchange.calls == []
    rig.delete(ONE)
    assert rig.bank.held(LEAF).version == 3


def test_a_forecast_changes_nothing_and_says_all(rig: DeletionRig, run: RunDirectory) -> None:
    before = rig.contents()
    told = rig.forecast(ONE).to_json()
    assert (rig.contents(), rig.bank.revision) == (before, 0)
    assert not run.deletion_dir.exists()
    training = told["training"]
    assert isinstance(training, dict)
    assert training["num_steps"] > 0
    retrained = told["retrained"]
    assert isinstance(retrained, list)
    assert [part["ref"] for part in retrained] == ["1/0", "2/0"]


def test_weights_are_removed_when_all_is_done(rig: DeletionRig, run: RunDirectory) -> None:
    forecast = rig.forecast(ONE)
    rig.delete(ONE)
    left = {path.name for path in forecast.folder.path.iterdir()}
    assert left == {"deletion.json", "receipt.json"}


def test_topics_are_told_anew_what_they_are(rig: DeletionRig) -> None:
    rig.delete(ONE)
    counts = {ref: words.num_documents for ref, words in rig.exchange.words.items()}
    tree = rig.client.tree()
    assert counts == {ref: tree.num_documents[ref] - 1 for ref in (TOP, LEAF)}
    assert all(words.label for words in rig.exchange.words.values())


def test_a_job_begins_anew_where_the_recipe_has_changed(
    rig: DeletionRig, run: RunDirectory
) -> None:
    with pytest.raises(Killed):
        rig.delete(ONE, CAREFUL, on_progress=_kill_at(3))
    config = load_config(run)
    longer = replace(config, stage2=replace(config.stage2, num_tokens=50 * 4 * SEQ_LEN))
    run.write_json(run.config_file, longer.to_json())
    steps: list[int] = []
    rig.delete(ONE, CAREFUL, on_progress=lambda progress: steps.append(progress.step))
    assert steps[0] == 1


@pytest.mark.parametrize("name", ["deletion.json", "../deleted.json"])
@pytest.mark.parametrize("content", ["{", '{"phase": 3, "tiny-1": "x"}'])
def test_a_damaged_account_is_said_and_not_guessed(
    rig: DeletionRig, name: str, content: str
) -> None:
    folder = rig.forecast(ONE).folder.path
    folder.mkdir(parents=True)
    (folder / name).write_text(content)
    with pytest.raises(CorruptionError, match="restore it from a copy"):
        rig.forecast(ONE)


def test_texts_that_the_corpus_does_not_have_are_said(rig: DeletionRig, world: World) -> None:
    named = [
        NamedDocument(line=1, text="The number of zoe is 3."),
        NamedDocument(line=2, text=world.documents[0].text),
    ]
    material = RunMaterial(rig.run, rig.spec.bank_id)
    forecast = forecast_deletion(rig.client, material, named, DeletionConfig())
    assert forecast.plan.removed == (0,)
    (said,) = forecast.unknown
    assert "zoe" in said
    with pytest.raises(InvalidArgumentError, match="none of the documents is in corpus"):
        forecast_deletion(rig.client, material, named[:1], DeletionConfig())
