"""The `Modelfile` beside a GGUF. Ollama reads the prompt's format and the sampling from it, not from the GGUF."""

import json
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from hf_model.modeling_custom_gpt import CustomGPTForCausalLM
from hf_model.tokenizer import takes_instructions

FILE = "Modelfile"
CONTENT = "Qx7Content7xQ"  # stands for a user's message while the chat template is rendered
# Go's templates, not Jinja's. Only the last question is asked, as the chat template does.
LAST_QUESTION = """\
{{- range $i, $_ := .Messages }}
{{- if and (eq .Role "user") (eq (len (slice $.Messages $i)) 1) }}{{ %s }}{{ .Content }}{{ %s }}
{{- end }}
{{- end }}"""
RAW_PROMPT = "{{ .Prompt }}"


def modelfile(gguf: str, model: CustomGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> str:
    """The text of a Modelfile.

    Args:
        gguf: the name of the GGUF file in the same folder.
        adds_bos: llama.cpp puts the beginning of text in front of each prompt.
    """
    template = RAW_PROMPT
    if takes_instructions(tokenizer):
        before, after = _around_content(tokenizer)
        if adds_bos:
            before = before.removeprefix(tokenizer.bos_token)
        # As Go's string literals, which JSON's are too: no brace or quote in the prompt can end the template.
        template = LAST_QUESTION % (json.dumps(before), json.dumps(after))
    parameters = [f"PARAMETER {name} {value}" for name, value in _parameters(model, tokenizer)]
    return "\n".join([f"FROM ./{gguf}", f'TEMPLATE """{template}"""', *parameters, ""])


def _around_content(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after the content of a single user message."""
    messages = [{"role": "user", "content": CONTENT}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, _, after = text.partition(CONTENT)
    return before, after


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
    end = tokenizer.eos_token
    if end and end.isprintable() and '"' not in end:  # a Modelfile has no escapes
        yield "stop", f'"{end}"'
