"""How a prompt is made: by the tokenizer's chat template or, without one, as raw text. Nothing else decides this."""

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from hf_model.errors import UserError, one_line
from hf_model.tokenizer.trial_child import conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD, UNK = "[BOS]", "[EOS]", "[PAD]", "[UNK]"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# The entry of tokenizer_config.json that says what the model's prompts are: the original's instructions, those of
# another chat template, or raw text. It counts only in a folder without a chat template: a trainer may have added one.
PROMPT_FORMAT, INSTRUCTION, CHAT, RAW = "prompt_format", "instruction", "chat", "raw"

Message = dict[str, str]
"""A `role` and a `content`; a user's message may have an `input` too."""


# The chat templates. Content may be a string or the list of text parts that servers pass on. Whatever stands in a
# generation block is trained on.

_TEXT = """\
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
"""
# The prompt ends where the answer begins, whether or not a generation prompt is asked for: a user's turn ends there in
# training too.
#
# These models were fine-tuned on single turns, while chat clients send all that was said before. So a conversation that
# ends in a question becomes that question alone, unless `multi_turn` is set; one that ends in an answer is a text to
# train on, and stays whole. The format has no place for a system message: it is left out.
_SINGLE_TURNS = """\
{%- if messages and messages[-1].role == "user" and not multi_turn -%}
    {%- set messages = messages[-1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- bos_token ~ "<INSTRUCTION>" ~ text(message.content) -}}
        {%- if message.input -%}
            {{- "<INPUT>" ~ message.input -}}
        {%- endif -%}
        {{- "<RESPONSE>" -}}
    {%- elif message.role == "assistant" -%}
        {%- generation -%}
            {{- <SPACE>text(message.content) ~ eos_token -}}
        {%- endgeneration -%}
    {%- elif message.role not in ("system", "developer") -%}
        {{- raise_exception("This prompt format has the roles user and assistant, not " ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
"""


def _single_turns(instruction: str, input: str, response: str, space: str = "") -> str:
    """The template of a format that has these texts in front of the instruction and the input, and of the answer."""
    parts = {"<INSTRUCTION>": instruction, "<INPUT>": input, "<RESPONSE>": response, "<SPACE>": space}
    return _TEXT + re.sub("|".join(parts), lambda part: parts[part[0]], _SINGLE_TURNS)


# The original's format, as `format_example` writes it.
CHAT_TEMPLATE = _single_turns("Instruction: ", " Input: ", " Response:", space='" " ~ ')
# Stanford Alpaca's wording in the form of "Build a Large Language Model (From Scratch)", chapter 7 (`format_input`).
ALPACA = _single_turns(
    r"Below is an instruction that describes a task. "
    r"Write a response that appropriately completes the request.\n\n### Instruction:\n",
    r"\n\n### Input:\n",
    r"\n\n### Response:\n",
)
# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = (
    _TEXT
    + r"""{{- bos_token -}}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\n" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
            {{- text(message.content) ~ "<|im_end|>" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- text(message.content) ~ "<|im_end|>" -}}
    {%- endif -%}
    {{- "\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n" -}}
{%- endif -%}
"""
)
TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML}
"""The templates that a user chooses by name."""
OURS = (CHAT_TEMPLATE, *TEMPLATES.values())


# Which template a tokenizer has, and what it does.


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The template that makes a prompt; None if prompts are raw text. This is the only place that decides.

    The folder has it; older folders have none, and their special tokens tell.
    """
    own = tokenizer.chat_template
    if own is not None:
        return own.get("default") if isinstance(own, dict) else own
    by_tokens = INSTRUCTION if (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS) else RAW
    return CHAT_TEMPLATE if tokenizer.init_kwargs.get(PROMPT_FORMAT, by_tokens) == INSTRUCTION else None


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
    """Let a template make the prompts; with None, prompts are raw text."""
    kind = RAW if template is None else INSTRUCTION if template == CHAT_TEMPLATE else CHAT
    tokenizer.chat_template, tokenizer.init_kwargs[PROMPT_FORMAT] = template, kind


def takes_instructions(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a chat template makes the model's prompts; otherwise they are raw text."""
    return chat_template(tokenizer) is not None


@dataclass(frozen=True)
class PromptFormat:
    """What a chat template does with a conversation. It was found by rendering some."""

    takes_input: bool
    """Whether the `input` of a user's message appears."""
    has_turns: bool
    """Whether the turns before the last question appear."""
    before_answer: str
    """What stands between the prompt and the answer, such as a space."""
    after_answer: str
    """What stands behind the last answer, such as the end token and a newline."""
    end: str
    """The part of it that ends the answer; some templates ask for the next answer at once."""


def prompt_format(tokenizer: "PreTrainedTokenizerBase") -> PromptFormat:
    """What the tokenizer's chat template does; for raw text, there is nothing around a prompt."""
    template = chat_template(tokenizer)
    return PromptFormat(False, False, "", "", "") if template is None else _observe(template, _special(tokenizer))


def _special(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[str, str], ...]:
    return tuple((role, token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str))


@lru_cache(maxsize=16)
def _observe(template: str, special: tuple[tuple[str, str], ...]) -> PromptFormat:
    # The trial in another process has rendered the same conversations, with other marks: no template can know these.
    question, answer, earlier, more = marks = [secrets.token_hex(8) for _ in range(4)]

    def render(messages: list[Message], is_prompt: bool) -> str:
        tokens: dict[str, Any] = dict(special)
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=is_prompt, **tokens
            )
            return str(rendered[0][0])
        except Exception:  # the template refuses this conversation, with an error of any class
            return ""

    texts = {name: render(*how) for name, how in conversations(*marks).items()}
    prompt, conversation = texts["a question"], texts["a second question"]
    before, found, after = texts["an answer"].rpartition(answer)
    has_turns = earlier in conversation and answer in conversation
    between = conversation.rpartition(answer)[2].partition(question)[0]
    end = after
    if has_turns and prompt == texts["a question alone"]:
        # It asks for the next answer in any case. What stands behind an answer before another question has only the
        # beginning in common with that.
        end = _common_start(after, between)
    if has_turns and not end.strip():
        # Some templates end an answer only before the next question, which begins as the first one does.
        begins = _common_start(between[::-1], prompt.partition(question)[0][::-1])[::-1]
        end = between.removesuffix(begins) if between.removesuffix(begins).strip() else end
    return PromptFormat(
        takes_input=more in texts["an input"],
        has_turns=has_turns,
        before_answer=before.removeprefix(prompt) if found and prompt and before.startswith(prompt) else "",
        after_answer=after if found else "",
        end=end if found else "",
    )


def _common_start(one: str, other: str) -> str:
    return "".join(char for char, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokens that end an answer: the one that the chat template puts behind it, then the `eos_token`."""
    special, end = _special_tokens(tokenizer), prompt_format(tokenizer).end
    others = [token for token in tokenizer.get_added_vocab() if token.strip() and token not in special]
    first = _one_of(special).search(end) or _one_of(others).search(end)
    ends = [first[0] if first else None, tokenizer.eos_token]
    return list(dict.fromkeys(token for token in ends if token))


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _one_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """A pattern for any of these tokens; of two that begin alike, the longer one."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def end_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(end_tokens(tokenizer))
    return [ids] if isinstance(ids, int) else ids


def end_of_answer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the chat template puts behind an answer, up to and with its end token; without one, its visible text."""
    after = prompt_format(tokenizer).end
    if first := next((token for token in end_tokens(tokenizer)[:1] if token in after), None):
        return after[: after.index(first) + len(first)]
    return after.rstrip()


def end_text(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that ends an answer where the chat template has no token for that; otherwise ""."""
    end = end_of_answer(tokenizer)
    return "" if any(token in end for token in end_tokens(tokenizer)) else end


# Prompts.


def user_message(prompt: str, input_text: str = "") -> Message:
    return {"role": "user", "content": prompt} | ({"input": input_text} if input_text else {})


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, is_prompt: bool = True) -> str:
    """What the tokenizer's chat template makes of messages. The library renders it, in its sandbox.

    Args:
        is_prompt: the model answers; otherwise the messages are a text to train on.

    Raises:
        UserError: the template refuses the messages, or has no place for an input.
    """
    if any(message.get("input") for message in messages) and not prompt_format(tokenizer).takes_input:
        raise UserError("the model's chat template has no place for an input: put it into the prompt")
    template = chat_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=is_prompt, tokenize=False
        )
        return str(text)
    except Exception as error:  # a template can fail in any way
        raise UserError(f"the model's chat template refuses this prompt ({one_line(error, 200)})") from None


def prompt_text(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, input_text: str = "", turns: Sequence[Message] = ()
) -> str:
    """A prompt as the model reads it, without the `bos_token` in front; raw text as it is, which knows no input.

    Args:
        turns: the messages before it, if the format has turns.

    Raises:
        UserError: as `render`.
    """
    if not takes_instructions(tokenizer):
        return prompt
    text = render(tokenizer, [*turns, user_message(prompt, input_text)])
    return text.removeprefix(tokenizer.bos_token or "")


def fitted(tokenizer: "PreTrainedTokenizerBase", prompt: str, input_text: str) -> tuple[str, str]:
    """A prompt and an input of our own; the input becomes a part of the prompt where the format has no place for it."""
    if prompt_format(tokenizer).takes_input or not input_text:
        return prompt, input_text
    return f"{prompt} {input_text}", ""


def example_texts(
    tokenizer: "PreTrainedTokenizerBase", answer: str, prompt: str, input_text: str = ""
) -> tuple[str, str]:
    """The text to train on: the prompt, with special tokens, and the answer with what ends it.

    Raises:
        UserError: as `render`.
    """
    asked = user_message(prompt, input_text)
    start = render(tokenizer, [asked])
    whole = render(tokenizer, [asked, {"role": "assistant", "content": answer}], is_prompt=False)
    whole = whole.removesuffix(prompt_format(tokenizer).after_answer) + end_of_answer(tokenizer)
    # Some templates begin an answer with something that they leave out of the text to train on.
    at = len(start) if whole.startswith(start) else max(whole.rfind(answer.strip()), 0)
    return whole[:at], whole[at:]


def parts(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], parse_special_tokens: bool
) -> Iterator[tuple[str, bool]]:
    """The parts of a prompt that are encoded one after the other, and whether special tokens are read in each.

    The template's special tokens are read. Those in a message are text, unless `parse_special_tokens` is True.

    Raises:
        UserError: as `render`.
    """
    special = _special_tokens(tokenizer)
    pattern = _one_of(special)
    written = "\n".join(text for message in messages for key, text in message.items() if key != "role")
    if parse_special_tokens or not pattern.search(written):
        yield from beginning_apart(tokenizer, render(tokenizer, messages))
        return
    # A mark in place of each special token of a message tells it from the template's own.
    taken = "".join((written, chat_template(tokenizer) or "", *special))
    free = (char for char in map(chr, range(0xE000, 0x110000)) if char not in taken)
    marks = dict(zip(dict.fromkeys(pattern.findall(written)), free, strict=False))
    tokens = str.maketrans({mark: token for token, mark in marks.items()})

    def marked(key: str, text: str) -> str:
        return text if key == "role" else pattern.sub(lambda token: marks[token[0]], text)

    rendered = render(tokenizer, [{key: marked(key, text) for key, text in one.items()} for one in messages])
    end = 0
    for token in pattern.finditer(rendered):
        yield rendered[end : token.start()].translate(tokens), False
        yield token[0], True
        end = token.end()
    yield rendered[end:].translate(tokens), False


def beginning_apart(tokenizer: "PreTrainedTokenizerBase", text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a rendered text in which all special tokens are read.

    The trainers put the `bos_token` in front of an encoded text, whose first word SentencePiece begins with a space.
    """
    begin = tokenizer.bos_token or ""
    if begin and text.startswith(begin) and chat_template(tokenizer) in OURS:
        yield begin, True
        text = text.removeprefix(begin)
    yield text, True


# The original's format, written out.


def format_prompt(instruction: str, input_text: str = "") -> str:
    """The content that the original encodes for generation; its tokenizer puts `[BOS]` in front.

    >>> format_prompt("Name the capital of the country.", "France")
    'Instruction: Name the capital of the country. Input: France Response:'
    """
    input_field = f" Input: {input_text}" if input_text else ""
    return f"Instruction: {instruction}{input_field} Response:"


def format_example(instruction: str, response: str, input_text: str = "", *, bos: str = BOS, eos: str = EOS) -> str:
    """The original's fine-tuning text, encoded without adding special tokens. The loss is masked up to `Response:`.

    Args:
        bos, eos: what begins and ends a text, where the tokenizer's special tokens have other names.

    >>> format_example("What is the capital of France?", "Paris")
    '[BOS]Instruction: What is the capital of France? Response: Paris[EOS]'
    """
    return f"{bos}{format_prompt(instruction, input_text)} {response}{eos}"
