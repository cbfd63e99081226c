"""The chat template that a user chooses, or that a stranger's tokenizer has: found, and tried out before it is used."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_model.errors import UserError
from hf_model.reading import read_text
from hf_model.tokenizer.prompt import CHATML, IM_END, IM_START, OURS, TEMPLATES, chat_template
from hf_model.tokenizer.trial import check_template_by_trial

MAX_TEMPLATE_BYTES = 2**21


def read_template(choice: str | Path) -> str:
    """The Jinja of `"alpaca"`, `"chatml"` or a file.

    Raises:
        UserError: there is no such name or file, or it cannot be read.
    """
    if str(choice) in TEMPLATES:
        return TEMPLATES[str(choice)]
    if not Path(choice).exists():
        names = ", ".join(TEMPLATES)
        raise UserError(f"--chat_template {choice}: must be {names} or an existing Jinja file")
    return read_text(Path(choice), MAX_TEMPLATE_BYTES)


def check_tokens(tokenizer: PreTrainedTokenizerBase, tokenizer_path: str | Path) -> None:
    """Check that a tokenizer has the special tokens of ChatML, if its prompts are ChatML's.

    Raises:
        UserError: it has not.
    """
    known = tokenizer.get_added_vocab()
    if chat_template(tokenizer) == CHATML and (missing := [one for one in (IM_START, IM_END) if one not in known]):
        raise UserError(
            f"{tokenizer_path}: the tokenizer has no {' and no '.join(missing)}, which chatml is made of: give the "
            "tokenizer of the fine-tuning. For a model that learnt them as plain text, give --chat_template a file"
        )


def check_template(tokenizer: PreTrainedTokenizerBase, where: str | Path) -> None:
    """Try out a tokenizer's chat template, unless it is one of ours.

    Args:
        where: what an error message names.

    Raises:
        UserError: the template cannot be rendered, leaves the prompt out, or takes too much time or memory.
    """
    template = chat_template(tokenizer)
    if template is not None and template not in OURS:
        special = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        try:
            check_template_by_trial(template, special, where)
        except UserError as error:
            raise UserError(f"{error}; --raw, or another --chat_template, does without it") from None
