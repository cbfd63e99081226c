"""A page on what a checkpoint has learnt: what there is to show is computed first, and drawn after that."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from hf_model.errors import UserError, memory_for
from hf_model.learnt.content import gather
from hf_model.learnt.inspection import Inspection
from hf_model.learnt.page import MARK, render
from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.output_dir import disk_errors, write_file

__all__ = ["check_page", "write_page"]


def check_page(path: Path) -> None:
    """Refuse a place where no page can be written, or to replace a link, or a file that is no page of ours.

    Raises:
        UserError: it cannot be written there, or there is such a link or file.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written (there is no folder {path.parent}, or none of yours)")
    with disk_errors(path):
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link; name the file itself")
        if path.exists() and (not path.is_file() or not path.open("rb").read(len(MARK)) == MARK.encode()):
            raise UserError(f"{path}: exists already and is no report; choose another name for --report")


@memory_for("to draw the report")
def write_page(
    inspection: Inspection, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    """Write the page, one file that needs no other; it appears whole, and not through a link.

    Raises:
        UserError: it cannot be written, or a link or a file that is no page of ours is there.
    """
    check_page(path)
    page = render(gather(inspection, model, tokenizer))
    check_page(path)  # drawing it took a while
    with disk_errors(path):
        write_file(path, page.encode("utf-8", "replace"), overwrite=True)
