"""The `Modelfile` beside a GGUF. Ollama reads the prompt's format and the sampling from it, not from the GGUF."""

import json
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import CHATML, chat_template, end_text, end_tokens, prompt_format, render, user_message

FILE = "Modelfile"
CONTENT = "Qx7Content7xQ"  # stands for a user's message while the chat template is rendered
# Go's templates, not Jinja's. Only the last question is asked, as the chat template does.
LAST_QUESTION = """\
{{- range $i, $_ := .Messages }}
{{- if and (eq .Role "user") (eq (len (slice $.Messages $i)) 1) }}{{ %s }}{{ .Content }}{{ %s }}
{{- end }}
{{- end }}"""
CHATML_TURNS = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
ONLY_LAST = """\
# The model's chat template has several turns, but the TEMPLATE below asks the last question alone: Ollama reads Go's
# templates, not Jinja's. To keep the turns, write your template in Go (https://docs.ollama.com/template).
"""
RAW_PROMPT = "{{ .Prompt }}"


def modelfile(gguf: str, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> str:
    """The text of a Modelfile.

    Args:
        gguf: the name of the GGUF file in the same folder.
        adds_bos: llama.cpp puts the beginning of text in front of each prompt.
    """
    template, comment, jinja = RAW_PROMPT, "", chat_template(tokenizer)
    if jinja == CHATML:
        template = CHATML_TURNS
    elif jinja is not None:
        comment = ONLY_LAST if prompt_format(tokenizer).has_turns else ""
        before, after = _around_content(tokenizer)
        if adds_bos:
            before = before.removeprefix(tokenizer.bos_token or "")
        template = LAST_QUESTION % (_go_literal(before), _go_literal(after))
    parameters = [f"PARAMETER {name} {value}" for name, value in _parameters(model, tokenizer)]
    return "\n".join([f"FROM ./{gguf}", f'{comment}TEMPLATE """{template}"""', *parameters, ""])


def _around_content(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after the content of a single user message."""
    before, _, after = render(tokenizer, [user_message(CONTENT)]).partition(CONTENT)
    return before, after


def _go_literal(text: str) -> str:
    """A string literal of Go, so that no brace or quote of a prompt can end the template.

    JSON's is one too, except that Go reads no pairs of surrogates.
    """
    literal = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in literal)


def _parameters(model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, object]]:
    """The model's own settings, without which Ollama would take defaults of its own."""
    context, settings = model.config.block_size, model.generation_config
    yield "num_ctx", context
    # An answer must end within the context, so it gets half of it at most.
    yield "num_predict", max(1, min(settings.max_new_tokens or context, context // 2))
    yield "temperature", (settings.temperature or 1.0) if settings.do_sample else 0
    yield "top_k", settings.top_k or 50
    yield "top_p", settings.top_p or 1.0
    yield "repeat_penalty", settings.repetition_penalty or 1.0
    for end in (*end_tokens(tokenizer), end_text(tokenizer).strip()):
        if end and end.isprintable() and '"' not in end:  # a Modelfile has no escapes
            yield "stop", f'"{end}"'
