"""Makes each system call that writes a folder or a batch's files fail, and loses power after each of them.

test_syscalls.py runs this module with the library made from syscalls.c preloaded. It prints what it has tried.
"""

import ctypes
import errno
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hf_model import output_dir
from hf_model.errors import UserError
from hf_model.output_dir import MANIFEST, difference, whole_folder
from hf_model.records import open_journal

LIBRARY = ctypes.CDLL(None)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
ALL_ERRORS = "ALL_ERRORS" in os.environ
CHOICES = int(os.environ.get("POWER_LOSSES", "3"))  # random sets of lost writes at each place
OPTIONS = {"temperature": 0}
KEYS = ["a", "b", "c", "d"]
ANSWERS = {index: f"answer {index}" * 50 for index in range(len(KEYS))}
RECORDS = [{"prompt": key} for key in KEYS]


# What is written, and what must be there whatever happened.


def write(target: Path, content: str, names: tuple[str, ...] = ("config.json", "model.safetensors")) -> None:
    with whole_folder(target, overwrite=True, say=lambda line: None) as work:
        for name in names:
            (work / name).write_text(content * 1000)


def content_of(target: Path) -> str | None:
    """The first letters of config.json in a folder, which must be whole; None without a folder."""
    if not target.exists():
        return None
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", MANIFEST}
    assert difference(target) == ""
    return (target / "config.json").read_text()[:3]


def next_run(target: Path) -> None:
    """Clear what an earlier run left, and write nothing."""
    try:
        with whole_folder(target, overwrite=True, say=lambda line: None):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


class Folder:
    """An older folder is replaced by a newer one. One that a person has edited is kept beside the newer one."""

    def __init__(self, in_one_step: bool, has_old: bool = True, is_edited: bool = False):
        self.in_one_step, self.has_old, self.is_edited = in_one_step, has_old, is_edited

    def target(self, root: Path) -> Path:
        return root / "hf" if self.has_old else root / "deep" / "hf"

    def prepare(self, root: Path) -> None:
        output_dir.rename_exactly = rename_exactly if self.in_one_step else lambda one, other, flags: False
        if self.has_old:
            write(self.target(root), "old")
        if self.is_edited:
            (self.target(root) / "README.md").write_text("mine")

    def act(self, root: Path) -> None:
        write(self.target(root), "new")

    def check(self, root: Path, *, is_killed: bool) -> None:
        target = self.target(root)
        if self.is_edited:
            self.check_edited(target, is_killed)
            return
        expected = {"new", "old" if self.has_old else None}
        found = content_of(target)
        assert found in expected | ({None} if is_killed and not self.in_one_step else set()), found
        if target.parent.exists():
            next_run(target)
            assert content_of(target) in expected
            assert [path.name for path in target.parent.iterdir()] in ([target.name], []), list(root.rglob("*"))

    def check_edited(self, target: Path, is_killed: bool) -> None:
        assert target.exists() or (is_killed and not self.in_one_step)
        next_run(target)
        kept = target.with_name("hf.1")
        if kept.exists():
            assert content_of(target) == "new"
        else:
            kept = target
        assert (kept / "README.md").read_text() == "mine"
        assert (kept / "config.json").read_text() == "old" * 1000
        assert {path.name for path in target.parent.iterdir()} == {target.name, kept.name}


rename_exactly = output_dir.rename_exactly


class Answers:
    """A batch run answers records one by one."""

    overwrite = False

    def prepare(self, root: Path) -> None:
        (root / "other").write_text("mine")

    def act(self, root: Path) -> None:
        with open_journal(root / "out", OPTIONS, self.overwrite) as journal:
            for index in sorted(ANSWERS.keys() - journal.responses(KEYS).keys()):
                journal.append([(KEYS[index], ANSWERS[index])])
            journal.finish(RECORDS, ANSWERS, overwrite=False)

    def check(self, root: Path, *, is_killed: bool) -> None:
        assert (root / "other").read_text() == "mine"
        if not (root / "out").exists():
            with open_journal(root / "out", OPTIONS, self.overwrite) as journal:
                assert journal.responses(KEYS).items() <= ANSWERS.items()
            self.act(root)
        assert (root / "out").read_text().count("answer 3") == 50
        assert {path.name for path in root.iterdir()} <= {"out", "other", "out.partial"}, list(root.iterdir())


class OtherAnswers(Answers):
    """A batch run that discards answers made with other options."""

    overwrite = True

    def prepare(self, root: Path) -> None:
        super().prepare(root)
        with open_journal(root / "out", {"temperature": 1}) as journal:
            journal.append([(key, "another answer") for key in KEYS])


SCENARIOS: dict[str, Folder | Answers] = {
    "a folder replaced in one step": Folder(in_one_step=True),
    "a folder replaced in two steps": Folder(in_one_step=False),
    "an edited folder kept, in one step": Folder(in_one_step=True, is_edited=True),
    "an edited folder kept, in two steps": Folder(in_one_step=False, is_edited=True),
    "a new folder in a new place": Folder(in_one_step=True, has_old=False),
    "a batch run": Answers(),
    "a batch run with other options": OtherAnswers(),
}


# A system call that fails, or is the last one.


def start(act: Callable[[Path], None], root: Path, at: int = 0, code: int = 0, log: Path | None = None) -> int:
    """Do something in a child process. Its exit status is 2 after a UserError and 1 after any other error."""
    process = os.fork()
    if process == 0:
        LIBRARY.watch(bytes(root), at, code, bytes(log) if log else None)
        try:
            act(root)
            os._exit(0)
        except UserError as error:
            os._exit(2 if str(error).isprintable() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(process, 0)[1]


def fail_everywhere(scenario: Folder | Answers) -> int:
    """Start a run for each call and each way in which the call can fail; return the number of runs."""
    runs, n_calls = 0, len(recorded(scenario)[1])
    for turn in range(4 if ALL_ERRORS else 2):  # 0 kills; the errors take turns, or each call has each of them
        for at in range(1, n_calls + 8):  # some of a run's calls fail by themselves
            code = ERRORS[(turn + at) % 3] if turn else 0
            with fresh(scenario) as root:
                status = start(scenario.act, root, at, code)
                runs += 1
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 2), f"call {at} fails with {code}"
                scenario.check(root, is_killed=code == 0)
    return runs


class fresh:  # noqa: N801
    """A folder for one run, prepared by the scenario."""

    def __init__(self, scenario: Folder | Answers):
        self.scenario = scenario

    def __enter__(self) -> Path:
        self.place = Path(tempfile.mkdtemp(dir=MEMORY))
        root = self.place / "root"
        root.mkdir()
        self.scenario.prepare(root)
        return root

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.place)


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# A loss of power: the disk has all that was synced, and any part of the rest.


@dataclass(eq=False)
class Node:
    """A file's content, or a folder's names, as the disk has them."""

    is_folder: bool
    entries: dict[str, "Node"] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)


@dataclass(eq=False)
class Change:
    """What one call changes: names in folders (all or none of them reach the disk), or a stretch of a file."""

    names: list[tuple[Node, str, Node | None]] = field(default_factory=list)
    file: Node | None = None
    start: int = 0
    data: bytes = b""
    is_cut: bool = False

    def nodes(self) -> set[Node]:
        return {folder for folder, _, _ in self.names} | ({self.file} if self.file else set())

    def apply(self) -> None:
        for folder, name, node in self.names:
            folder.entries.pop(name, None)
            if node is not None:
                folder.entries[name] = node
        if self.file is not None:
            if self.is_cut:
                del self.file.content[self.start :]
            self.file.content.extend(bytes(max(0, self.start - len(self.file.content))))
            self.file.content[self.start : self.start + len(self.data)] = self.data


class Disk:
    """Turns a recorded run into changes, and a choice of them into a folder."""

    def __init__(self, root: Path):
        self.root, self.top = root, tree_of(root)
        self.before = snapshot(self.top)
        self.made: list[Node] = []  # files and folders that the run has created

    def find(self, path: str) -> Node:
        node = self.top
        for part in Path(path).relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def change(self, call: str, path: str, other: str, data: bytes) -> Change | set[Node]:
        """What a call changes. For a sync, the nodes that it brings to the disk."""
        if call == "fsync":
            return {self.find(path)}
        folder, name = (self.find(str(Path(path).parent)), Path(path).name) if path != str(self.root) else (None, "")
        assert folder is not None
        if call in ("create", "mkdir"):
            self.made.append(Node(is_folder=call == "mkdir"))
            return Change(names=[(folder, name, self.made[-1])])
        if call == "remove":
            return Change(names=[(folder, name, None)])
        node = folder.entries[name]
        if call == "write":
            return Change(file=node, start=len(node.content), data=data)
        if call == "truncate":
            return Change(file=node, start=int(other or 0), is_cut=True)
        target, new_name = self.find(str(Path(other).parent)), Path(other).name
        if call == "link":
            return Change(names=[(target, new_name, node)])
        replaced = target.entries[new_name] if call == "exchange" else None
        return Change(names=[(folder, name, replaced), (target, new_name, node)])

    def apply(self, changes: list[Change]) -> None:
        """Go back to what was there before the run, and make these changes."""
        restore([*self.before, *((node, {}, b"") for node in self.made)])
        for change in changes:
            change.apply()

    def write(self, changes: list[Change], place: Path) -> None:
        """Write the folder that these changes make of what was there before."""
        self.apply(changes)
        place.mkdir()
        materialize(self.top, place)


def tree_of(path: Path) -> Node:
    if not path.is_dir():
        return Node(is_folder=False, content=bytearray(path.read_bytes()))
    return Node(is_folder=True, entries={entry.name: tree_of(entry) for entry in path.iterdir()})


def snapshot(node: Node) -> list[tuple[Node, dict[str, Node], bytes]]:
    return [(node, dict(node.entries), bytes(node.content))] + [
        state for inner in node.entries.values() for state in snapshot(inner)
    ]


def restore(states: list[tuple[Node, dict[str, Node], bytes]]) -> None:
    for node, entries, content in states:
        node.entries, node.content = dict(entries), bytearray(content)


def materialize(node: Node, place: Path) -> None:
    for name, inner in node.entries.items():
        if inner.is_folder:
            (place / name).mkdir()
            materialize(inner, place / name)
        else:
            (place / name).write_bytes(inner.content)


def recorded(scenario: Folder | Answers) -> tuple[Disk, list[tuple[str, str, str, bytes]]]:
    with fresh(scenario) as root:
        state = Disk(root)
        log = root.parent / "log"
        assert start(scenario.act, root, log=log) == 0
        lines = [line.split("\t") for line in log.read_text().splitlines()]
    return state, [(call, path, other, bytes.fromhex(data)) for call, path, other, data in lines]


def losses(unsynced: list[Change], chosen: random.Random) -> Iterator[set[Change]]:
    """Sets of unsynced changes that are lost: none, all, each one alone, all but each one, and random sets.

    Names reach the disk in the order of the calls, as on file systems with a journal: after the first name that is
    lost, all later ones are lost too. Contents reach it in any order.
    """
    yield set()
    yield set(unsynced)
    for change in unsynced:
        yield {change}
        yield set(unsynced) - {change}
    for _ in range(CHOICES):
        yield {change for change in unsynced if chosen.random() < 0.5}


def lose_power_everywhere(scenario: Folder | Answers) -> int:
    """Lose power after each call of a run, with each set of losses; return the number of disks that were checked."""
    state, calls = recorded(scenario)
    chosen = random.Random(0)
    done: list[Change] = []
    synced: set[Change] = set()
    disks = 0
    for call in [*calls, None]:
        if call is not None:
            state.apply(done)
            found = state.change(*call)
            if isinstance(found, Change):
                done.append(found)
            else:
                synced |= {change for change in done if change.nodes() & found}
        last_name = max((index for index, change in enumerate(done) if change in synced and change.names), default=-1)
        synced |= {change for change in done[: last_name + 1] if change.names}
        unsynced = [change for change in done if change not in synced]
        for lost in losses(unsynced, chosen):
            first_lost = min((done.index(change) for change in lost if change.names), default=len(done))
            kept = [
                change
                for index, change in enumerate(done)
                if change not in lost and not (change.names and index > first_lost)
            ]
            place = Path(tempfile.mkdtemp(dir=MEMORY)) / "root"
            state.write(kept, place)
            try:
                scenario.check(place, is_killed=True)
            except BaseException:
                print(f"power lost after {len(done)} changes, the last {call and call[:3]}", file=sys.stderr)
                raise
            shutil.rmtree(place.parent)
            disks += 1
    return disks


if __name__ == "__main__":
    for title, scenario in SCENARIOS.items():
        print(f"{title}: {fail_everywhere(scenario)} calls that failed or were the last", flush=True)
        print(f"{title}: {lose_power_everywhere(scenario)} losses of power", flush=True)
