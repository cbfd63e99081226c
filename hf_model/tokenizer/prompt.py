"""The two kinds of prompt: the original's instructions (one function, and its chat template), and raw text."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD, UNK = "[BOS]", "[EOS]", "[PAD]", "[UNK]"
# The entry of tokenizer_config.json that says what the model's prompts are, and its two values.
PROMPT_FORMAT, INSTRUCTION, RAW = "prompt_format", "instruction", "raw"


def takes_instructions(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the model's prompts are instructions; otherwise they are raw text.

    This is the only place that decides. The folder says it; older folders do not, and their special tokens tell.
    """
    by_tokens = INSTRUCTION if (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS) else RAW
    return tokenizer.init_kwargs.get(PROMPT_FORMAT, by_tokens) == INSTRUCTION


def format_prompt(instruction: str, input_text: str = "") -> str:
    """The content that is encoded for generation; the tokenizer puts its `bos_token` in front.

    >>> format_prompt("Name the capital of the country.", "France")
    'Instruction: Name the capital of the country. Input: France Response:'
    """
    input_field = f" Input: {input_text}" if input_text else ""
    return f"Instruction: {instruction}{input_field} Response:"


def prompt_text(tokenizer: "PreTrainedTokenizerBase", prompt: str, input_text: str = "") -> str:
    """What is encoded of a prompt: an instruction in its format; raw text as it is, which knows no input."""
    return format_prompt(prompt, input_text) if takes_instructions(tokenizer) else prompt


def format_example(instruction: str, response: str, input_text: str = "", *, bos: str = BOS, eos: str = EOS) -> str:
    """The fine-tuning text, to be encoded without adding special tokens. The loss is masked up to `Response:`.

    Args:
        bos, eos: what begins and ends a text, where the tokenizer's special tokens have other names.

    >>> format_example("What is the capital of France?", "Paris")
    '[BOS]Instruction: What is the capital of France? Response: Paris[EOS]'
    """
    return f"{bos}{format_prompt(instruction, input_text)} {response}{eos}"


# The same in Jinja, for `tokenizer.apply_chat_template`. A user message may carry an "input" field, and its content may
# be a string or the list of text parts that servers pass on. The prompt ends in "Response:" whether or not a generation
# prompt is asked for: a user's turn ends there in training too. Whatever stands in a generation block is trained on.
#
# These models were fine-tuned on single turns, while chat clients send all that was said before. So a conversation that
# ends in a question becomes that question alone, unless `multi_turn` is set; one that ends in an answer is a text to
# train on, and stays whole. The format has no place for a system message: it is left out.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type != "text" -%}
                {{- raise_exception("This model reads text only, not " ~ part.type) -}}
            {%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[-1].role == "user" and not multi_turn -%}
    {%- set messages = messages[-1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- bos_token ~ "Instruction: " ~ text(message.content) -}}
        {%- if message.input -%}
            {{- " Input: " ~ message.input -}}
        {%- endif -%}
        {{- " Response:" -}}
    {%- elif message.role == "assistant" -%}
        {%- generation -%}
            {{- " " ~ text(message.content) ~ eos_token -}}
        {%- endgeneration -%}
    {%- elif message.role not in ("system", "developer") -%}
        {{- raise_exception("This prompt format has the roles user and assistant, not " ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
"""
