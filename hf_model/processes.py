"""The processes that share a batch run: how they find each other, and what they tell each other."""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import PrefixStore, TCPStore

from hf_model.errors import UserError, memory_for, one_line

T = TypeVar("T")
PATIENCE = 30.0  # seconds that processes which were started together wait for each other
A_WHILE = 5.0  # seconds after which the user is told what is waited for
LOOK_AGAIN = 0.1  # seconds
ALONE = "unset WORLD_SIZE to run alone, or start all with torchrun or accelerate launch"


class Processes:
    """This process and the others that share a run, started by `accelerate launch` or `torchrun`."""

    def __init__(self, state: PartialState | None = None):
        self.state = state
        """None: this process is alone."""
        self.count: int = state.num_processes if state else 1
        self.is_main: bool = state is None or state.is_main_process
        """Whether this process reads and writes the files, and talks to the user."""

    def share(self, items: list[T]) -> list[T]:
        """This process's part of a list that all processes have. A part may be empty."""
        # Not accelerate's `split_between_processes`: version 1.3 repeats the last item for a process without any.
        return items if self.state is None else items[self.state.process_index :: self.count]

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in every process.

        Raises:
            UserError: another process has ended.
        """
        with _another_has_ended():
            return items if self.state is None else gather_object(items)

    def from_main(self, value: T) -> T:
        """The main process's value, in every process.

        Raises:
            UserError: another process has ended.
        """
        with _another_has_ended():
            return value if self.state is None else broadcast_object_list([value])[0]

    def device(self, chosen: torch.device, is_certain: bool) -> torch.device:
        """This process's own device of the chosen kind; `chosen` itself if `is_certain` (the user gave its number)."""
        return chosen if self.state is None or is_certain or chosen.type == "cpu" else self.state.device

    def close(self) -> None:
        if self.state is not None:
            self.state.destroy_process_group()


def join(device: torch.device, report: Callable[[str], None] = lambda line: None) -> Processes:
    """Join the processes that `torchrun` or `accelerate launch` started with this one, to work on devices of this kind.

    Args:
        report: called with a line if the others are late.

    Raises:
        UserError: the others do not come (perhaps an earlier job has left its variables), or accelerate cannot connect
            processes that work on such a device.
    """
    met = _meet(report)
    state = PartialState(cpu=device.type == "cpu", **met)  # without `cpu`, processes on CPUs are not connected
    if state.num_processes == 1:
        raise UserError(f"several processes cannot share their work on {device.type}: start one, or give --device cpu")
    return Processes(state)


def _meet(report: Callable[[str], None]) -> dict[str, Any]:
    """Wait until all processes are there. Returns the arguments by which torch connects them.

    torch would wait half an hour, without a word, in code that neither Ctrl-C nor SIGTERM ends.

    Raises:
        UserError: the launcher's variables are not in order, or the others do not come.
    """
    try:
        rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE or MASTER_PORT is not a number ({error}): {ALONE}") from None
    host = os.environ["MASTER_ADDR"]
    told = f"RANK={rank}, WORLD_SIZE={world_size}, MASTER_ADDR={host} and MASTER_PORT={port}"
    if not 0 <= rank < world_size or not 0 < port < 2**16:
        raise UserError(f"{told} fit no process: {ALONE}")
    waits = _waits(told, report)
    # torchrun keeps the store itself; otherwise the first process does.
    keeps_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not keeps_store and not _is_open(host, port):
        next(waits)
    try:
        patience = timedelta(seconds=PATIENCE)
        place = "localhost" if keeps_store else host
        store = TCPStore(place, port, world_size, keeps_store, patience, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(f"{told}: no place to meet the other processes ({one_line(error, 150)}): {ALONE}") from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = PrefixStore(f"hf_model/{attempt}", store)
    # torchrun's store may have seen earlier runs, each of all processes.
    everybody = math.ceil(shared.add("arrived", 1) / world_size) * world_size
    while shared.add("arrived", 0) < everybody:
        next(waits)
    return {"store": shared, "rank": rank, "world_size": world_size}


def _waits(told: str, report: Callable[[str], None]) -> Iterator[None]:
    """Each step waits a moment. After a while it says so, and in the end it gives up with a UserError."""
    began, is_said = time.monotonic(), False
    while (waited := time.monotonic() - began) < PATIENCE:
        if waited > A_WHILE and not is_said:
            report(f"{told} are set: waiting for the other processes")
            is_said = True
        time.sleep(LOOK_AGAIN)
        yield
    raise UserError(f"{told} are set, but the other processes did not come within {PATIENCE:.0f} s: {ALONE}")


def _is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def _another_has_ended() -> Iterator[None]:
    """Turn torch's error about another process that has ended into a UserError. That process has printed the reason."""
    try:
        with memory_for("for what the processes tell each other", "choose a smaller --batch_size"):
            yield
    except RuntimeError as error:
        raise UserError(f"another process of this run has ended ({error})") from None
