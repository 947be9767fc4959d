"""A small run of the model of the protocol, and models with mistakes, which it must find."""

import re
from typing import Any, get_args

import pytest
from hypothesis import settings

from protocol import FAULTS, Background, Model, Save, State, explore
from pytree2safetensors._save import meeting, work
from pytree2safetensors._save.words import Failure, Words

# The larger models take a minute together.
THOROUGH = (settings.default or settings()).max_examples >= 10_000

TWO = [Save("1"), Save("2")]
THREE = [*TWO, Save("3")]
PARAMS, AVERAGE, OTHER = Save("params", "P"), Save("average", "Q"), Save("other", "R")


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kind", [Model, Background])
def test_two_processes_that_do_the_same(kind: type[Model], folder: bool, checksum: bool) -> None:
    faults = 1 + THOROUGH
    model = kind([TWO, TWO], faults, folder=folder, checksum=checksum)
    states, problem, way = explore(model)
    assert problem is None, way
    assert states > 1000


@pytest.mark.parametrize(
    "scripts",
    [
        [[PARAMS, AVERAGE], [AVERAGE, PARAMS]],
        [[PARAMS, AVERAGE], [PARAMS, AVERAGE, OTHER]],
        [[PARAMS, AVERAGE], [PARAMS, OTHER, AVERAGE]],
        [[PARAMS, AVERAGE], [AVERAGE]],
        [[PARAMS], [AVERAGE]],
    ],
)
@pytest.mark.parametrize("kind", [Model, Background])
def test_two_processes_that_differ_keep_the_protocol(
    kind: type[Model], scripts: list[list[Save]]
) -> None:
    _, problem, way = explore(kind(scripts, 1))
    assert problem is None, way


@pytest.mark.parametrize("number", [0, 1])
def test_saves_in_the_foreground_after_those_in_the_background(number: int) -> None:
    class Mixed(Background):
        foreground = frozenset({number})

    _, problem, way = explore(Mixed([TWO, TWO], 1))
    assert problem is None, way


def test_three_processes_keep_the_protocol() -> None:
    _, problem, way = explore(Model([TWO] * 3, int(THOROUGH)))
    assert problem is None, way


@pytest.mark.skipif(not THOROUGH, reason="takes long: for the thorough profile")
@pytest.mark.parametrize("kind", [Model, Background])
def test_more_saves_and_faults(kind: type[Model]) -> None:
    _, problem, way = explore(kind([THREE, THREE], 2))
    assert problem is None, way


def test_the_steps_have_the_names_of_the_code() -> None:
    seen = set[str]()

    class Watched(Model):
        def check(self, state: State) -> None:
            super().check(state)
            seen.update(re.split("[: ]", process.at)[0] for process in state.processes)

    explore(Watched([TWO, TWO], 1, folder=True, checksum=True))
    listed = re.search("The steps are (.*?)[.]", (work.__doc__ or "").replace("\n", " "))
    assert listed is not None
    steps = set(re.split(", | and ", listed[1]))
    assert seen == steps | {"idle", "dead"}
    keys = {"agree", *get_args(meeting.Step), "outcome"}  # the messages of each meeting
    assert keys <= steps
    for step in steps - keys:
        assert hasattr(work.Work, f"_{step}") or step in work.Work.__annotations__


# --- mistakes ---------------------------------------------------------------------------------


class WithoutCounts(Model):
    def words(self, process: Any, digest: str, failure: Failure | None) -> Words:
        return super().words(process, digest, failure)._replace(call=0)


class WithoutDigests(Model):
    def words(self, process: Any, digest: str, failure: Failure | None) -> Words:
        return super().words(process, "", failure)


class WithoutSecondMeetings(Model):
    def judge(self, verdict: Any, call: int) -> str:
        answer = super().judge(verdict, call)
        return "raise" if answer == "again" else answer


class WithoutMarksOfLeaving(Model):
    marks_leaving = False


class WithoutVotes(Model):
    collects_votes = False


class WithOldIndex(Model):
    sets_aside = False


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (WithoutCounts([TWO, TWO], 1, ("silent",)), "a reader of P finds"),
        (WithoutDigests([[PARAMS, AVERAGE], [AVERAGE, PARAMS]], 0, ()), "a reader of P finds"),
        (WithoutSecondMeetings([TWO, TWO], 1, ("silent",)), "save 1 had no fault"),
        (WithoutMarksOfLeaving([TWO, TWO], 1, ("leave",)), "waits for ever"),
        (WithoutVotes([TWO, TWO], 1, FAULTS), "a reader of P finds"),
        (WithOldIndex([TWO, TWO], 0, (), folder=True), "for the index of old"),
    ],
)
def test_a_mistake_is_found(model: Model, problem: str) -> None:
    _, found, way = explore(model)
    assert found is not None
    assert problem in found, way
