"""Prompts as turns of a conversation, in the words of the tokenizer's own chat template.

    in_chat({"sid_sid": "Bought so far:\\n{history}"}, tokenizer)
        -> {"sid_sid": "<|im_start|>user\\nBought so far:\\n{history}<|im_end|>\\n<|im_start|>assistant\\n"}

What comes out are templates like any others: they travel in prompts.json, and evaluation and serving follow them without
a chat template of their own. The answer is the assistant's turn, which the end token closes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sid_sft.encoding import added_around
from sid_sft.files import InputError, cut
from sid_sft.tasks import TASKS, check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "{content}"  # stands for a prompt while the text around it is found


def in_chat(prompts: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Task name -> template as the user's turn of a conversation, up to where the assistant's begins.

    InputError where the tokenizer has no chat template, or one that does not keep a turn's text as it is.
    """
    before, after = around_turn(tokenizer)
    turns = {name: before + template + after for name, template in prompts.items()}
    for name, turn in turns.items():
        check_template(f"--chat_template True: {name!r}", turn, TASKS[name])
    return turns


def around_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text that the chat template puts before a user's turn and behind it.

    A special token that the tokenizer begins every text with is not part of it, or it would stand there twice.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "--chat_template True: the tokenizer of --base_model has no chat template; expected an instruct model's"
        )
    try:
        turn = [{"role": "user", "content": CONTENT}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template of someone else's raises
        raise InputError(f"--chat_template True: the tokenizer's chat template fails: {cut(str(error))}") from None
    before, content, after = str(text).partition(CONTENT)
    if not content or CONTENT in after:
        raise InputError(
            f"--chat_template True: the tokenizer's chat template shows a turn's text {str(text).count(CONTENT)} times; "
            "expected once"
        )
    first = "".join(tokenizer.convert_ids_to_tokens(added_around(tokenizer)[0]))
    return before.removeprefix(first), after
