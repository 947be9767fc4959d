"""A model of how processes save together: every order of their steps, and faults between any two.

The steps have the names that they have in `_save/work.py` and `_save/meeting.py`, and what follows
from the words of a first meeting is computed by the code itself. `explore` visits all states.

A process carries out a script, a tuple of saves. What it writes is the tag of its save, so that a
file that was written by processes in different saves shows a mixture.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from pytree2safetensors._save.words import LEFT, Failure, Words, decide, judge

ERROR = Failure("OSError", "a fault")
FAULTS = ("error", "kill", "silent", "leave", "held")

Pairs = tuple[tuple[Any, Any], ...]  # a mapping that can be a part of a state


class Save(NamedTuple):
    """A save of a script: what it writes and where."""

    tag: str
    path: str = "P"


class Process(NamedTuple):
    """A process: its step, and what it knows."""

    at: str = "idle"
    failed: bool = False  # in this step, and the others do not know it yet
    number: int = 0  # of the save in its script
    call: int = 0  # saves that it has begun
    round: int = 0  # the number of the next first meeting
    save: int = -1  # the round in which the current save was agreed on
    held: bool = False  # an interrupt waits for the outcome
    outcomes: str = ""  # of each call: S saved, R raised before its vote, X raised after it
    queue: tuple["Process", ...] = ()  # in the background: the saves that its thread has to do


class State(NamedTuple):
    """The state of all processes and files at one moment."""

    processes: tuple[Process, ...]
    keys: Pairs  # of the coordination service
    visible: Pairs  # files by (path, name): who wrote each part
    temporaries: Pairs  # by token
    aside: Pairs  # older files, which an error puts back
    faults: int  # that may still happen
    committed: frozenset[tuple[str, str]]  # tags and paths
    last_fault: int = -1  # the save in which the last fault happened


class Broken(Exception):
    """A property does not hold."""


def put(pairs: Pairs, key: Any, value: Any) -> Pairs:
    return tuple(sorted([*without(pairs, key), (key, value)], key=repr))


def without(pairs: Pairs, key: Any) -> Pairs:
    return tuple(pair for pair in pairs if pair[0] != key)


Next = Iterator[tuple[str, State]]


class Model:
    """Processes that save in the foreground, one script each."""

    def __init__(
        self,
        scripts: list[list[Save]],
        faults: int,
        kinds: tuple[str, ...] = FAULTS,
        *,
        folder: bool = False,
        checksum: bool = False,
    ) -> None:
        self.scripts, self.faults, self.kinds = scripts, faults, kinds
        self.checksum, self.folder = checksum, folder
        self.names = ("file 0", "file 1") if folder else ("file 0",)
        self.count = len(scripts)
        self.aligned = all(script == scripts[0] for script in scripts)

    def start(self) -> State:
        visible: Pairs = ()
        for path in {save.path for script in self.scripts for save in script}:
            for name in self.names:
                visible = put(visible, (path, name), ("old",) * (self.count + 1))
            if self.folder:
                visible = put(visible, (path, "index"), "old")
        return State((Process(),) * self.count, (), visible, (), (), self.faults, frozenset())

    # --- what must hold ---

    def check(self, state: State) -> None:
        """A reader finds a whole checkpoint, or none, at any moment."""
        files = dict(state.visible)
        for path, name in files:
            if not self.folder:
                if len(set(files[path, name])) != 1:
                    raise Broken(f"a reader of {path} finds {files[path, name]}")
            elif (tag := files.get((path, "index"))) is not None:
                parts = {part for file in self.names for part in files.get((path, file), (None,))}
                if parts != {tag}:
                    raise Broken(f"a reader of {path} finds {parts} for the index of {tag}")

    def check_end(self, state: State) -> None:
        """No process waits forever, nothing is left, and all processes agree on what happened."""
        for number, process in enumerate(state.processes):
            if process.at != "dead" and not self.is_gone(state, number):
                raise Broken(f"process {number} waits for ever in {process.at}")
        alive = [process for process in state.processes if process.at != "dead"]
        if state.processes[0].at != "dead" and (state.temporaries or state.aside):
            raise Broken(f"left over: {state.temporaries} {state.aside}")
        if not self.aligned:
            return
        for index in range(len(self.scripts[0])):
            ends = {p.outcomes[index] for p in alive if len(p.outcomes) > index}
            if {"R", "S"} <= ends:
                raise Broken(f"save {index} succeeded and failed: {[p.outcomes for p in alive]}")
            if len(alive) == self.count and index > state.last_fault and ends != {"S"}:
                raise Broken(f"save {index} had no fault: {[p.outcomes for p in alive]}")

    def is_gone(self, state: State, number: int) -> bool:
        process = state.processes[number]
        done = process.number == len(self.scripts[number])
        return process.at == "dead" or (process.at == "idle" and done)

    # --- what may be wrong in a model that must fail ---

    def words(self, process: Process, digest: str, failure: Failure | None) -> Words:
        return Words(process.call, digest, failure, token=str(process.call))

    def judge(self, verdict: Any, call: int) -> str:
        try:
            return judge(verdict, call)
        except Exception:  # noqa: BLE001 - that it raises is what counts
            return "raise"

    marks_leaving = sets_aside = collects_votes = True

    # --- steps ---

    def next(self, state: State) -> Next:
        for number in range(self.count):
            yield from self.step(state, number)

    def to(self, state: State, number: int, process: Process, **changes: Any) -> State:
        processes = (*state.processes[:number], process, *state.processes[number + 1 :])
        return state._replace(processes=processes, **changes)

    def end(self, state: State, number: int, outcome: str, **changes: Any) -> State:
        """The call ends; process 0 removes its temporary files."""
        process, state = state.processes[number], state._replace(**changes)
        save = self.scripts[number][process.number]
        if outcome == "S" and (save.tag, save.path) not in state.committed:
            raise Broken(f"process {number} is informed that {save} is saved")
        outcome = "X" if outcome == "S" and process.held else outcome
        if number == 0:
            state = state._replace(temporaries=without(state.temporaries, str(process.call)))
        process = process._replace(
            at="idle", failed=False, number=process.number + 1, save=-1, held=False,
            outcomes=process.outcomes + outcome,
        )  # fmt: skip
        return self.to(state, number, process)

    def step(self, state: State, number: int) -> Next:
        process = state.processes[number]
        at, script = process.at, self.scripts[number]
        if at == "dead" or (at == "idle" and process.number == len(script)):
            return
        save = script[process.number]
        if state.faults:
            yield from self.faulty(state, number, process)
        if at == "idle":
            begun = process._replace(at="prepare", call=process.call + 1)
            yield f"{number} calls {save.tag}", self.to(state, number, begun)
        elif at == "prepare":
            temporaries = state.temporaries
            if number == 0:
                empty = ((None,) * (self.count + 1),) * len(self.names)
                temporaries = put(temporaries, str(process.call), empty)
            after = process._replace(at="agree")
            yield f"{number} prepares", self.to(state, number, after, temporaries=temporaries)
        elif at == "agree":
            failure = ERROR if process.failed else None
            words = self.words(process, "" if failure else save.path, failure)
            keys = put(state.keys, (process.round, "agree", number), words)
            after = process._replace(at="agree: wait", failed=False, round=process.round + 1)
            yield f"{number} says {words}", self.to(state, number, after, keys=keys)
        elif at == "agree: wait":
            yield from self.agree(state, number, process)
        elif at.startswith("write "):
            yield from self.write(state, number, process, int(at[6:]), save.tag)
        elif at == "hash":
            yield f"{number} hashes", self.to(state, number, process._replace(at="vote"))
        elif at in {"written", "vote"}:
            yield from self.tell(state, number, process)
        elif at == "written: wait":
            answers = self.answers(state, number, process.save, "written")
            if answers == "gone":
                yield f"{number} waits too long", self.end(state, number, "R")
            elif answers is not None:
                keys = state.keys
                if number == 0:
                    keys = put(keys, (process.save, "written", "all"), answers)
                if any(answers):
                    yield f"{number} raises", self.end(state, number, "R", keys=keys)
                else:
                    after = process._replace(at="hash")
                    yield f"{number} goes on", self.to(state, number, after, keys=keys)
        elif number == 0:
            yield from self.commit(state, process, save)
        else:
            yield from self.outcome(state, number, process)

    def faulty(self, state: State, number: int, process: Process) -> Next:
        """What may go wrong, or interrupt a process, in any step."""
        at = process.at
        state = state._replace(
            faults=state.faults - 1, last_fault=max(state.last_fault, process.number)
        )
        if "kill" in self.kinds:
            yield f"{number} is killed in {at}", self.to(state, number, process._replace(at="dead"))
        if at == "idle":
            if "silent" in self.kinds:  # interrupted after counting the call, without a message
                counted = self.to(state, number, process._replace(call=process.call + 1))
                yield f"{number} raises silently", self.end(counted, number, "R")
            return
        voted = number > 0 and at == "outcome" and not process.failed
        working = at in {"prepare", "hash"} or at.startswith("write ")
        if "error" in self.kinds and working and not process.failed:
            after = {"prepare": "agree", "hash": "vote"}.get(at, self.after_writing)
            failed = process._replace(at=after, failed=True)
            yield f"{number} fails in {at}", self.to(state, number, failed)
        if "leave" in self.kinds and at not in {"prepare", "agree"} and not at.startswith("commit"):
            keys, waits = state.keys, at == "agree: wait"
            if self.marks_leaving:
                number_of_round = process.save if process.save >= 0 else process.round - waits
                keys = put(keys, (number_of_round, "left", number), process.call)
            left = self.end(state, number, "X" if voted else "R", keys=keys)
            if not (number == 0 and at == "outcome"):
                yield f"{number} leaves in {at}", left
        if "held" in self.kinds and voted and not process.held:
            yield f"{number} holds", self.to(state, number, process._replace(held=True))

    def agree(self, state: State, number: int, process: Process) -> Next:
        meeting, keys = process.round - 1, state.keys
        found = dict(keys)
        if number == 0:
            answers = self.answers(state, 0, meeting, "agree")
            if answers is None:
                return
            verdict: Any = decide(answers)
            keys = put(keys, (meeting, "agree", "all"), verdict)
        else:
            verdict = found.get((meeting, "agree", "all"))
            left = found.get((meeting, "left", 0))
            if verdict is None and left is None and not self.is_gone(state, 0):
                return
            if verdict is None:
                again = left is not None and left < process.call
                after = process._replace(at="agree")
                done = self.to(state, number, after) if again else self.end(state, number, "R")
                yield f"{number} hears nothing", done
                return
        answer = self.judge(verdict, process.call)
        if answer == "go":
            token = process._replace(at="write 0", save=meeting)
            yield f"{number} agrees", self.to(state, number, token, keys=keys)
        elif answer == "again":
            after = process._replace(at="agree")
            yield f"{number} meets again", self.to(state, number, after, keys=keys)
        else:
            yield f"{number} raises", self.end(state, number, "R", keys=keys)

    def answers(self, state: State, number: int, meeting: int, step: str) -> Any:
        """What process 0 receives from all, or the others from process 0; None while they wait."""
        found = dict(state.keys)
        if number:
            verdict = found.get((meeting, step, "all"))
            if verdict is None and ((meeting, "left", 0) in found or self.is_gone(state, 0)):
                return "gone"
            return verdict
        answers = []
        for other in range(self.count):
            said, left = found.get((meeting, step, other)), found.get((meeting, "left", other))
            if step == "agree" and left is not None:
                said = Words(left, "", LEFT)
            elif (meeting, step, other) not in found:
                if left is None and not self.is_gone(state, other):
                    return None
                # JAX ends this process in the end if another one is dead.
                call = state.processes[0].call
                said = Words(call, "", LEFT) if step == "agree" else LEFT
            answers.append(said)
        return tuple(answers)

    @property
    def after_writing(self) -> str:
        return "written" if self.checksum else "vote"

    def token(self, state: State, process: Process) -> str:
        token: str = dict(state.keys)[process.save, "agree", "all"].token
        return token

    def write(self, state: State, number: int, process: Process, file: int, tag: str) -> Next:
        token = self.token(state, process)
        files = dict(state.temporaries).get(token)
        if files is None:
            failed = process._replace(at=self.after_writing, failed=True)
            yield f"{number} finds no file", self.to(state, number, failed)
            return
        parts = [*files[file]]
        parts[number] = tag
        if number == 0 and not self.checksum:
            parts[-1] = tag  # the header
        written = (*files[:file], tuple(parts), *files[file + 1 :])
        last = file + 1 == len(self.names)
        after = process._replace(at=self.after_writing if last else f"write {file + 1}")
        temporaries = put(state.temporaries, token, written)
        yield f"{number} writes {file}", self.to(state, number, after, temporaries=temporaries)

    def tell(self, state: State, number: int, process: Process) -> Next:
        """Post the result of a step. A failed process also waits for the outcome."""
        failure = ERROR if process.failed else None
        keys = put(state.keys, (process.save, process.at, number), failure)
        if process.at == "written":
            after = process._replace(at="written: wait", failed=False)
        else:
            after = process._replace(at="outcome" if number else "vote: collect")
        yield f"{number} tells {failure} of {process.at}", self.to(state, number, after, keys=keys)

    def commit(self, state: State, process: Process, save: Save) -> Next:
        """What process 0 does alone: it collects the votes, commits, and announces the outcome."""
        at, outcome = process.at, (process.save, "outcome")
        if at == "vote: collect":
            votes = self.answers(state, 0, process.save, "vote")
            if votes is None:
                return
            if any(votes) and self.collects_votes:
                yield "0 gives up", self.end(state, 0, "R", keys=put(state.keys, outcome, ERROR))
            else:
                yield "0 commits", self.to(state, 0, process._replace(at="commit"))
            return
        if at == "outcome":
            yield "0 announces", self.end(state, 0, "S", keys=put(state.keys, outcome, None))
            return
        if state.faults and "error" in self.kinds:
            visible = state.visible
            for name, older in state.aside:
                visible = put(visible, name, older)
            yield f"0 fails in {at}", self.end(
                state._replace(
                    faults=state.faults - 1, last_fault=max(state.last_fault, process.number)
                ),
                0, "R", visible=visible, aside=(), keys=put(state.keys, outcome, ERROR),
            )  # fmt: skip
        token = self.token(state, process)
        files = dict(state.temporaries)[token]
        done = {(save.tag, save.path)} if all({*file} == {save.tag} for file in files) else set()
        committed = state.committed | done
        visible, aside, index = state.visible, state.aside, (save.path, "index")
        if at == "commit":  # the headers
            whole = tuple((*file[:-1], save.tag) for file in files)
            after = process._replace(at="commit: aside" if self.folder else "commit: rename")
            temporaries = put(state.temporaries, token, whole)
            yield "0 writes headers", self.to(state, 0, after, temporaries=temporaries)
        elif not self.folder:
            visible = put(visible, (save.path, self.names[0]), files[0])
            after = process._replace(at="outcome")
            yield "0 renames", self.to(state, 0, after, visible=visible, committed=committed)
        elif at == "commit: aside":
            if (older := dict(visible).get(index)) is not None:
                aside = put(aside, index, older)
                visible = without(visible, index) if self.sets_aside else visible
            after = process._replace(at="commit: rename")
            yield "0 moves the index", self.to(state, 0, after, visible=visible, aside=aside)
        elif at == "commit: rename":
            number = next(n for n, f in enumerate(self.names) if (save.path, f) not in dict(aside))
            name = (save.path, self.names[number])
            aside = put(aside, name, dict(visible)[name])
            visible = put(visible, name, files[number])
            last = number + 1 == len(self.names)
            after = process._replace(at="commit: index" if last else at)
            yield f"0 renames {number}", self.to(state, 0, after, visible=visible, aside=aside)
        else:
            visible = put(visible, index, save.tag)
            after = process._replace(at="outcome")
            yield (
                "0 places the index",
                self.to(state, 0, after, visible=visible, aside=(), committed=committed),
            )

    def outcome(self, state: State, number: int, process: Process) -> Next:
        found = dict(state.keys)
        raised = "R" if process.failed else "X"
        if (process.save, "outcome") in found:
            failure = found[process.save, "outcome"]
            if failure is None and process.failed:
                raise Broken("committed without a vote")
            yield f"{number} hears {failure}", self.end(state, number, raised if failure else "S")
        elif (process.save, "left", 0) in found or self.is_gone(state, 0):
            yield f"{number} waits too long", self.end(state, number, raised)


class Background(Model):
    """Processes that agree in the call; a thread of each does the rest, first in, first out.

    In the code each save is like this: in the foreground the caller waits for the thread.
    """

    foreground: frozenset[int] = frozenset()  # the numbers of saves for which the caller waits

    def is_gone(self, state: State, number: int) -> bool:
        return super().is_gone(state, number) and not state.processes[number].queue

    def step(self, state: State, number: int) -> Next:
        process = state.processes[number]
        queue = process.queue
        waits = bool(queue) and process.at == "idle" and process.number - 1 in self.foreground
        if not waits:
            yield from self.call(state, number, process)
        if not queue:
            return
        for label, following in super().step(self.to(state, number, queue[0]), number):
            job = following.processes[number]
            if job.at == "dead":
                after = process._replace(at="dead", queue=())
            elif job.at == "idle":
                before, place = process.outcomes, queue[0].number
                outcomes = before[:place] + job.outcomes + before[place + 1 :]
                after = process._replace(outcomes=outcomes, queue=queue[1:])
            else:
                after = process._replace(queue=(job, *queue[1:]))
            yield f"in the background {label}", self.to(following, number, after)

    def call(self, state: State, number: int, process: Process) -> Next:
        alone = self.to(state, number, process._replace(queue=()))
        for label, following in super().step(alone, number):
            after = following.processes[number]
            if after.at == "write 0":
                job = after._replace(outcomes="")
                after = after._replace(
                    at="idle",
                    number=after.number + 1,
                    save=-1,
                    outcomes=after.outcomes + "?",
                    queue=(*process.queue, job),
                )
            elif after.at != "dead":
                after = after._replace(queue=process.queue)
            yield label, self.to(following, number, after)


def explore(model: Model, limit: int = 1_000_000) -> tuple[int, str | None, list[str]]:
    """Visit all states: their number, a property that does not hold, and the way to it."""
    start = model.start()
    back: dict[State, tuple[State, str] | None] = {start: None}
    pending = deque([start])

    def way_to(state: State) -> list[str]:
        found: list[str] = []
        while (step := back[state]) is not None:
            state, label = step
            found.append(label)
        return found[::-1]

    while pending:
        state = pending.popleft()
        try:
            model.check(state)
            stuck = True
            for label, following in model.next(state):
                stuck = False
                if following not in back:
                    back[following] = (state, label)
                    pending.append(following)
            if stuck:
                model.check_end(state)
        except Broken as error:
            return len(back), str(error), way_to(state)
        if len(back) > limit:
            return len(back), "too many states", []
    return len(back), None, []
