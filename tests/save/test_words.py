"""The messages of processes that save together, and what follows from them."""

import errno
import json

import pytest

from pytree2safetensors import FileFormatError, KeyPathError
from pytree2safetensors._save import words
from pytree2safetensors._save.words import Failure, Verdict, Words, decide, judge

FULL = Failure("OSError", "No space left on device: 'file'", errno.ENOSPC)
BUG = Failure("ZeroDivisionError", "division by zero")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([Words(1, "a", token="t", start=8)], Verdict(1, None, None, None, "t", 8)),
        ([Words(2, "a"), Words(2, "a")], Verdict(2, None, None, None, "", 0)),
        ([Words(2, "a"), Words(2, "b"), Words(2, "c")], Verdict(2, None, None, 1, "", 0)),
        ([Words(2, "a"), Words(1, "a"), Words(3, "a")], Verdict(3, 0, None, None, "", 0)),
        ([Words(2, "a"), Words(2, "", BUG)], Verdict(2, None, (1, BUG), 1, "", 0)),
        ([Words(2, "a"), Words(1, "", BUG)], Verdict(2, 1, None, 1, "", 0)),
        ([Words(1, "", FULL), Words(1, "", BUG)], Verdict(1, None, (0, FULL), None, "", 0)),
    ],
)
def test_a_verdict_follows_from_the_words_of_all_processes(
    said: list[Words], expected: Verdict
) -> None:
    assert decide(said) == expected


@pytest.mark.parametrize(
    ("verdict", "answer"),
    [
        (Verdict(2, None, None, None, "", 0), "go"),
        (Verdict(2, 1, None, None, "", 0), "again"),
        (Verdict(2, 1, None, 1, "", 0), "again"),
        (Verdict(2, None, None, 1, "", 0), "explain"),
    ],
)
def test_a_verdict_says_what_a_process_does(verdict: Verdict, answer: str) -> None:
    assert judge(verdict, 2) == answer


def test_judge_raises_on_a_process_that_is_behind() -> None:
    with pytest.raises(FileFormatError) as caught:
        judge(Verdict(3, 0, (1, BUG), 1, "", 0), 2)
    assert str(caught.value) == (
        "this process begins save number 2 of arrays of several processes, and another process "
        "begins number 3; nothing was written; call save_pytree equally often on all processes"
    )


def test_judge_raises_an_error_of_this_call_before_it_meets_again() -> None:
    with pytest.raises(RuntimeError, match="process 1 could not save: ZeroDivisionError: division"):
        judge(Verdict(3, 0, (1, BUG), None, "", 0), 3)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (KeyPathError("@"), KeyPathError, "process 3 could not save: @"),
        (TypeError("no"), RuntimeError, "process 3 could not save: TypeError: no"),
        (OSError(28, "full", "f"), OSError, "[Errno 28] process 3 could not save: full: 'f'"),
        (TimeoutError("late"), RuntimeError, "process 3 could not save: TimeoutError: late"),
        (KeyPathError("\\" * 9999), KeyPathError, "process 3 could not save: " + "\\" * 400),
    ],
)
def test_errors_of_other_processes(error: Exception, kind: type[Exception], text: str) -> None:
    failure = words.read_failure(json.dumps(words.failure_of(error)))
    assert failure is not None
    found = words.error_of(3, failure)
    assert type(found) is kind
    assert str(found) == text


def test_words_and_verdicts_survive_json() -> None:
    for said in Words(3, "d", BUG, "t", 9), Words(3, "d"), Words(1, "", FULL):
        assert words.read_words(json.dumps(said)) == said
    for verdict in Verdict(2, None, (1, FULL), 1, "t", 8), Verdict(2, 1, None, None, "", 0):
        assert words.read_verdict(json.dumps(verdict)) == verdict


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"a": "1", "b": "3"}, "b is 2 on process 0 and 3 on process 7"),
        ({"a": "1"}, "b is 2 on process 0 and missing on process 7"),
        ({"a": "1", "b": "2", "c": "4"}, "c is missing on process 0 and 4 on process 7"),
        ({"b": "2", "a": "1"}, "process 7 has other names, or the same names in another order"),
    ],
)
def test_a_difference_is_named(other: dict[str, str], text: str) -> None:
    first = {"a": "1", "b": "2"}
    assert words.digest_of(first) != words.digest_of(other)
    assert words.difference(first, other, 7) == text
