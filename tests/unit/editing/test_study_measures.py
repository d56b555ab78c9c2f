"""What the editing study counts: which neighbours are evidence of what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editing_rig import EditingRig
from membank.trainer.editing import FactEdit, Statement
from membank.trainer.editing.staging import Router
from membank.trainer.editing.study.cases import Case, Neighbour
from membank.trainer.editing.study.measures import (
    BankView,
    CaseMeasures,
    case_prompts,
    measure_case,
)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EditingRig]:
    rig = EditingRig(tmp_path / "edits")
    yield rig
    rig.client.close()


def measured(rig: EditingRig, neighbour: Neighbour) -> CaseMeasures:
    """Measure a case with one neighbour, whose answers were others before."""
    prompt = "The number of ada is"
    case = Case(
        edit=FactEdit(edit_id="one", prompt=prompt, target="55", paraphrases=("ada has",)),
        relation="number",
        subject="ada",
        old="31",
        unseen=("The number of ada is now",),
        hop="The name with the number 55 is",
        old_hop="The name with the number 31 is",
        path=rig.client.route(prompt),
        neighbours=(neighbour,),
    )
    router = Router(rig.client)
    view = BankView(rig.client, rig.answers, router)
    before = dict.fromkeys(case_prompts(case), "")
    return measure_case(case, view, before, touched=frozenset(), router=router)


def neighbour_of(target: str, *, given: bool) -> Neighbour:
    asked = Statement(prompt="The number of bob is", target=target)
    return Neighbour(asked=asked, reworded=("The number of bob is now",), given=given)


def test_a_neighbour_is_asked_whether_its_own_object_is_likelier(rig: EditingRig) -> None:
    found = measured(rig, neighbour_of("12", given=False))
    assert found.neighbourhood in {0.0, 1.0}
    assert found.neighbours_leaked in {0.0, 1.0}


def test_a_neighbour_that_has_the_new_object_by_right_is_no_evidence(rig: EditingRig) -> None:
    """It is not likelier than itself, and to state it is no leak: that counted as two failures."""
    found = measured(rig, neighbour_of("55", given=False))
    assert found.neighbourhood is None
    assert found.neighbours_leaked is None
    assert found.neighbours_held == 0.0


def test_a_neighbour_that_the_edit_was_given_is_not_counted_as_neighbourhood(
    rig: EditingRig,
) -> None:
    found = measured(rig, neighbour_of("12", given=True))
    assert found.neighbourhood is None
    assert found.neighbours_given == 0.0
