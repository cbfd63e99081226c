"""The processes that share one run: `accelerate launch` or `torchrun` starts them. Usually there is one, by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from hf_model.errors import UserError, memory_for

T = TypeVar("T")


class Processes:
    """This process and those beside it; without a `PartialState` of accelerate's there are none beside it."""

    def __init__(self, state: PartialState | None = None):
        self.state = state

    @property
    def count(self) -> int:
        return self.state.num_processes if self.state else 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that reads and writes files, and talks to the user."""
        return self.state is None or self.state.is_main_process

    def share(self, items: list[T]) -> list[T]:
        """This process's part of a list that all have, each item in one part only; some may be empty."""
        # Not accelerate's `split_between_processes`: that of 1.3 gives the last item again to whom it has nothing for.
        return items if self.state is None else items[self.state.process_index :: self.count]

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes, one behind the other.

        Raises:
            UserError: another process has ended.
        """
        with _another_has_ended():
            return items if self.state is None else gather_object(items)

    def from_main(self, value: T) -> T:
        """The main process's value.

        Raises:
            UserError: another process has ended.
        """
        with _another_has_ended():
            return value if self.state is None else broadcast_object_list([value])[0]

    def device(self, chosen: torch.device, is_certain: bool) -> torch.device:
        """Where this process works: on its own device of the chosen kind, unless a certain one was chosen."""
        return chosen if self.state is None or is_certain or chosen.type == "cpu" else self.state.device

    def close(self) -> None:
        if self.state is not None:
            self.state.destroy_process_group()


def join(device: torch.device) -> Processes:
    """Join the processes that were started with this one, to work on devices of this kind.

    Raises:
        UserError: accelerate knows no way to connect processes that work on such a device.
    """
    state = PartialState(cpu=device.type == "cpu")  # where that is not said, processes on CPUs stay alone
    if state.num_processes == 1:
        raise UserError(f"several processes cannot share their work on {device.type}: start one, or give --device cpu")
    return Processes(state)


@contextmanager
def _another_has_ended() -> Iterator[None]:
    """What torch raises when it waits for a process that is gone; that one has said why, this one need not."""
    try:
        with memory_for("for what the processes tell each other", "choose a smaller --batch_size"):
            yield
    except RuntimeError as error:
        raise UserError(f"another process of this run has ended ({error})") from None
