"""Stand-in: runs a function in several processes on the loopback, for the tests of parallelism."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# The processes are forked from a server that has imported what they need: imports would take most of their time.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["hf_model", "tests.test_fsdp_mixin", "tests.test_tensor_parallel_mixin"]
)


def run_distributed(world_size: int) -> Callable:
    """`run_distributed(2)(function)(*args)` calls `function(rank, *args)` in two processes that form a group."""

    def runner(function: Callable) -> Callable:
        def run(*args: Any) -> None:
            # The rendezvous is served from here, where it takes a free port before the ranks ask for it.
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (function, args, world_size, store.port), world_size)

        return run

    return runner


def _run_rank(rank: int, function: Callable, args: tuple, world_size: int, port: int) -> None:
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    function(rank, *args)
    dist.destroy_process_group()


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    torch.multiprocessing.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Each rank has the whole CPU."""
    torch.set_num_threads(1)
