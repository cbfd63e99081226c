"""Threads, forked workers and other copies of this code in one process do not disturb each other."""

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_model
from hf_model import CustomGPTForCausalLM, generation, loading
from hf_model.conversion import convert
from hf_model.generation import Sampling, encode
from hf_model.tokenizer import format_prompt
from hf_model.trainers import read_checkpoint
from tests.reliability.files import save, weights
from tests.tiny import CHECKPOINT, TOKENIZER

THREAD_SECONDS = float(os.environ.get("THREAD_SECONDS", "4"))
N_THREADS = 6
DTYPES = ("float32", "float16", "bfloat16")
PROMPT = format_prompt("What is the capital of France?")


@pytest.mark.parametrize("temperature", [0, 1.5], ids=["greedy", "sampled"])
def test_generations_of_one_model_in_threads_give_what_they_give_alone(temperature: float) -> None:
    model, tokenizer = loading.load(CHECKPOINT, TOKENIZER, device=torch.device("cpu"))

    def answer(seed: int) -> list[str]:
        sampling = Sampling(max_new_tokens=30, temperature=temperature, seed=seed, num_return_sequences=1)
        prompt = format_prompt(f"What is the capital of France? {seed}")
        return generation.generate(model, tokenizer, encode(tokenizer, prompt), sampling).texts

    alone = [answer(seed) for seed in range(8)]
    assert len(set(map(tuple, alone))) == 8
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, range(8))) == alone


class TestSideBySide:
    """Loads of three dtypes, generation and conversion at once, each compared with what it gives alone."""

    @pytest.fixture(scope="class")
    def folders(self, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        root = tmp_path_factory.mktemp("folders")
        return [convert(CHECKPOINT, TOKENIZER, root / dtype, dtype=dtype) for dtype in DTYPES]

    def test_nothing_changes(self, folders: list[Path], tmp_path: Path) -> None:
        model, tokenizer = loading.load(folders[0], device="cpu")
        sampling = Sampling(max_new_tokens=20, temperature=1.0)

        def weights_of(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
            state = loading.load(folder, device="cpu")[0].plain().state_dict()
            return {
                name: (weight.dtype, weight.contiguous().view(torch.uint8).numpy().tobytes())
                for name, weight in state.items()
            }

        def answer(seed: int) -> list[str]:
            return generation.generate(model, tokenizer, encode(tokenizer, PROMPT), replace(sampling, seed=seed)).texts

        def converted(name: str, format: str, dtype: str) -> dict[str, bytes]:
            folder = convert(CHECKPOINT, TOKENIZER, tmp_path / name, format=format, dtype=dtype)
            weights = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
            shutil.rmtree(folder)
            return weights

        tasks: list[Callable[[str], Any]] = [
            *(lambda _, folder=folder: weights_of(folder) for folder in folders),
            *(lambda _, seed=seed: answer(seed) for seed in range(3)),
            *(
                lambda name, format=format, dtype=dtype: converted(name, format, dtype)
                for format in ("transformers", "gpt2")
                for dtype in DTYPES
            ),
        ]
        alone = [task("alone") for task in tasks]
        dtype, end = torch.get_default_dtype(), time.monotonic() + THREAD_SECONDS
        done: Counter[int] = Counter()

        def work(worker: int) -> None:
            order = random.Random(worker)
            while time.monotonic() < end:
                number = order.randrange(len(tasks))
                assert tasks[number](f"{worker}") == alone[number], f"task {number}"
                done[number] += 1

        with ThreadPoolExecutor(N_THREADS) as threads:
            list(threads.map(work, range(N_THREADS)))
        assert torch.get_default_dtype() == dtype
        loads, answers, conversions = (sum(done[n] for n in part) for part in (range(3), range(3, 6), range(6, 12)))
        print(
            f"{N_THREADS} threads, {THREAD_SECONDS:.0f} s: {loads} loads, {answers} answers, {conversions} conversions"
        )


@pytest.mark.parametrize("format", ["transformers", "gpt2"])
def test_a_conversion_and_a_load_leave_the_default_dtype_to_the_other_threads(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they do is the same whatever the default is, too."""
    torch.set_default_dtype(torch.float64)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "set_default_dtype", lambda dtype: pytest.fail(f"sets {dtype} for all threads"))
            folder = convert(CHECKPOINT, TOKENIZER, tmp_path / "hf", format=format, dtype="bfloat16")
            if format == "transformers":
                assert loading.load(folder, device="cpu")[0].dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_checkpoints_with_classes_of_their_own_are_read_in_threads(tmp_path: Path) -> None:
    contents = [{"model": weights(n_embd=8), "config": stated} for stated in (argparse.Namespace(n_head=2), Path("x"))]
    paths = [save(tmp_path / f"{i}.pt", content) for i, content in enumerate(contents)]
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(read_checkpoint, paths * 30))
    assert [checkpoint.model_args for checkpoint in read] == [{"n_head": 2}, {}] * 30


def test_importing_the_package_again_registers_the_same_names(capitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "hf_model"]:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("hf_model")
    try:
        assert again is not hf_model
        assert type(AutoConfig.from_pretrained(capitals)) is again.CustomGPTConfig
        assert type(AutoModelForCausalLM.from_pretrained(capitals)) is again.CustomGPTForCausalLM
    finally:
        monkeypatch.undo()
        importlib.reload(hf_model)
    assert type(AutoModelForCausalLM.from_pretrained(capitals)) is CustomGPTForCausalLM


def test_a_folder_s_own_code_is_loaded_beside_the_package(
    capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(capitals, tmp_path / "with_code")
    input_ids = torch.tensor([[2, 10, 20, 30]])
    ours = AutoModelForCausalLM.from_pretrained(folder)
    from_hub = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    its_config = get_class_from_dynamic_module("configuration_custom_gpt.CustomGPTConfig", folder)
    its_model = get_class_from_dynamic_module("modeling_custom_gpt.CustomGPTForCausalLM", folder)
    assert its_model is not CustomGPTForCausalLM
    its = its_model.from_pretrained(folder, config=its_config.from_pretrained(folder))
    for model in (from_hub, its):
        assert torch.equal(model(input_ids).logits, ours(input_ids).logits)
    its.save_pretrained(tmp_path / "again")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) is CustomGPTForCausalLM


def logits_of(folder: Path) -> list[float]:
    """What a worker that was forked from this process makes of a folder."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return model(torch.tensor([[2, 10, 20, 30]])).logits.flatten().tolist()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_workers_load_and_run_the_model(capitals: Path) -> None:
    expected = logits_of(capitals)
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map_async(logits_of, [capitals] * 4).get(timeout=120) == [expected] * 4


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_worker_that_is_forked_while_a_thread_generates_can_generate() -> None:
    model, tokenizer = loading.load(CHECKPOINT, TOKENIZER, device="cpu")
    ids, sampling = encode(tokenizer, PROMPT), Sampling(max_new_tokens=5, temperature=0)
    expected = generation.generate(model, tokenizer, ids, sampling).texts
    began, may_end = threading.Event(), threading.Event()

    def wait(_: str) -> None:
        began.set()
        may_end.wait()

    def generate() -> list[str]:
        torch.set_num_threads(1)
        return generation.generate(model, tokenizer, ids, sampling).texts

    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(generation.generate, model, tokenizer, ids, sampling, on_text=wait)
        began.wait()
        try:
            answers: multiprocessing.SimpleQueue[list[str]] = multiprocessing.get_context("fork").SimpleQueue()
            worker = multiprocessing.get_context("fork").Process(target=lambda: answers.put(generate()))
            worker.start()
            worker.join(60)
            is_done = worker.exitcode == 0
            worker.kill()
        finally:
            may_end.set()
        assert is_done and answers.get() == slow.result().texts == expected
