"""What is said of a checkpoint or a folder without writing anything."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from examples.plain_gpt import save_checkpoint
from hf_model.learnt.inspection import inspect
from hf_model_cli import convert as convert_command
from tests.test_cli import EXAMPLE, Result, call  # noqa: F401
from tests.tiny import CHECKPOINT, ROOT, TOKENIZER, gpt, save_files, save_tokenizer

QUESTIONS = ROOT / "examples" / "evaluation" / "questions.jsonl"


def test_tells_where_each_value_was_found(tmp_path: Path) -> None:
    found, _, _ = inspect(*save_files(tmp_path, gpt(bias=False)), n_head=2)
    origins = {name: (value.value, value.origin) for name, value in found.architecture.items()}
    assert origins["n_layer"] == (2, "the weights")
    assert origins["bias"] == (False, "the weights")
    assert origins["n_head"] == (2, "--n_head")
    assert origins["dropout"] == (0.1, "model_args")
    assert origins["activation_function"][0] == "gelu"


def test_the_values_of_a_folder_are_its_configuration_s(capitals: Path) -> None:
    found, _, _ = inspect(capitals)
    assert {value.origin for value in found.architecture.values()} == {"its config.json"}
    assert found.architecture["n_head"].value == 3
    assert found.diagnosis.verdict == "healthy"


@pytest.mark.parametrize("trained", [True, False])
def test_tells_whether_the_optimizer_s_state_is_there(trained: bool, tmp_path: Path) -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    save_checkpoint(
        tmp_path / "ckpt.pt", model, iter_num=7, loss=float("nan"), optimizer=optimizer if trained else None
    )
    found, _, _ = inspect(tmp_path / "ckpt.pt", save_tokenizer(tmp_path / "tokenizer.json"))
    assert found.as_dict()["source"] == {
        "weights_key": "model_state_dict",
        "progress": {"iter_num": 7, "loss": None},  # NaN is no JSON
        "optimizer": trained,
        "other_keys": ["optimizer_state_dict"] if trained else [],
    }


def test_weights_that_are_not_finite_are_named_and_nothing_is_asked_of_them(tmp_path: Path) -> None:
    model = gpt()
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = float("nan")
    found, _, _ = inspect(*save_files(tmp_path, model), training_data=QUESTIONS)
    assert found.non_finite == ("transformer.h.1.mlp.c_fc.weight",)
    assert found.diagnosis is None and found.measurement is None
    assert "the model cannot work" in "\n".join(found.lines())


class TestCommand:
    def test_says_what_the_converter_says_and_writes_nothing(
        self,
        call: Callable[..., Result],  # noqa: F811
        tmp_path: Path,
    ) -> None:
        converted = call(convert_command, *EXAMPLE, "--output_dir", str(tmp_path / "hf"))
        before = sorted(CHECKPOINT.parent.iterdir())
        inspected = call(convert_command, *EXAMPLE, "--inspect")
        assert inspected.status == 0
        head = converted.out.split("written ")[0].splitlines()
        assert head and set(head) <= set(inspected.out.splitlines())
        assert sorted(CHECKPOINT.parent.iterdir()) == before

    def test_json_is_one_object(self, call: Callable[..., Result], tmp_path: Path) -> None:  # noqa: F811
        data = tmp_path / "few.jsonl"
        data.write_text("".join(QUESTIONS.open(encoding="utf-8").readlines()[:40]), encoding="utf-8")
        result = call(convert_command, *EXAMPLE, "--inspect", "--json", "--training_data", str(data))
        found = json.loads(result.out)
        assert found["diagnosis"]["verdict"] == "healthy"
        assert found["parameters"] == 535_200
        assert found["architecture"]["n_embd"] == {"value": 96, "origin": "the weights"}
        assert found["training_data"]["n_exact"] == found["training_data"]["n_asked"] == 32

    def test_a_folder_needs_no_tokenizer(self, capitals: Path, call: Callable[..., Result]) -> None:  # noqa: F811
        result = call(convert_command, "--checkpoint_path", str(capitals), "--inspect")
        assert result.status == 0
        assert result.out.startswith(f"source        {capitals} (a folder)")

    @pytest.mark.parametrize(
        "arguments, said",
        [
            (("--json",), "--json: goes with --inspect"),
            (("--inspect", "--output_dir", "out"), "--output_dir: not allowed with argument --inspect"),
            (("--inspect", "--overwrite"), "--overwrite: not allowed"),
            (("--inspect", "--training_data", "none.jsonl"), "there is no file none.jsonl"),
            (("--inspect", "--report", "/nowhere/at/all.html"), "there is no folder /nowhere/at"),
            (("--inspect", "--report", str(ROOT)), "is a folder"),
        ],
    )
    def test_refuses_in_one_line(self, arguments: tuple, said: str, call: Callable[..., Result]) -> None:  # noqa: F811
        result = call(convert_command, *EXAMPLE, *arguments)
        assert result.status == 2
        assert said in result.err and result.err.count("\n") == 1

    def test_a_report_replaces_no_other_file(self, tmp_path: Path, call: Callable[..., Result]) -> None:  # noqa: F811
        mine = tmp_path / "mine.html"
        mine.write_text("<p>mine", encoding="utf-8")
        result = call(convert_command, *EXAMPLE, "--inspect", "--report", str(mine))
        assert result.status == 2 and "exists already and is no report" in result.err
        assert mine.read_text(encoding="utf-8") == "<p>mine"


def test_a_folder_s_own_options_are_refused(capitals: Path, call: Callable[..., Result]) -> None:  # noqa: F811
    result = call(convert_command, "--checkpoint_path", str(capitals), "--inspect", "--n_head", "3")
    assert result.status == 2 and "config.json tells" in result.err


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path, call: Callable[..., Result]) -> None:  # noqa: F811
    checkpoint_path, _ = save_files(tmp_path, gpt())
    arguments = ("--checkpoint_path", str(checkpoint_path), "--tokenizer_path", str(TOKENIZER))
    result = call(convert_command, *arguments, "--inspect")
    assert result.status == 2 and "they do not belong together" in result.err
