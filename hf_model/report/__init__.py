"""A page on what a checkpoint has learnt: what there is to show is computed first, and drawn after that."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hf_model.disk import disk_errors
from hf_model.errors import UserError, memory_for
from hf_model.inspection import Inspection
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.report.content import gather
from hf_model.report.page import MARK, render

__all__ = ["check_page", "write_page"]


def check_page(path: Path) -> None:
    """Refuse to replace a file that is no page of ours.

    Raises:
        UserError: there is such a file.
    """
    with disk_errors(path):
        if path.exists() and (not path.is_file() or not path.open("rb").read(len(MARK)) == MARK.encode()):
            raise UserError(f"{path}: exists already and is no report; choose another name for --report")


@memory_for("to draw the report")
def write_page(
    inspection: Inspection, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write the page, one file that needs no other.

    Raises:
        UserError: it cannot be written, or a file that is no page of ours is there.
    """
    check_page(path)
    page = render(gather(inspection, model, tokenizer))
    with disk_errors(path):
        path.write_bytes(page.encode("utf-8", "replace"))
