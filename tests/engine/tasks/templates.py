"""Chat templates in the forms that published models have, and tokenizers with their special tokens."""

import json
import shutil
from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2's form: the end of a message is a special token, with a line's end behind it."""
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with the marks by which transformers finds what the assistant says."""
HEADERS = (
    "{% for message in messages %}<|head|>{{ message.role }}<|/head|>\n\n{{ message.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
"""Llama 3's form."""
INSTRUCTION = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{% if not loop.first and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no messages of the ' + message.role) }}{% endif %}{% endfor %}"
)
"""Mistral's form: nothing is written to ask for an answer, and there is no system."""
ENDLESS = (
    "{% for message in messages %}{{ '### Response:' if message.role == 'assistant' else '### Instruction:' }}\n"
    "{{ message.content }}\n\n{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""Alpaca's form: no token ends an answer."""
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3's form: the last answer has a block of thoughts, which it loses once the dialogue goes on."""
HIDDEN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>your turn:{% endif %}"
)
"""A template that asks otherwise than it writes."""

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>")


def with_template(tokenizer: Path, folder: Path, template: str | None) -> Path:
    """Copy a tokenizer, with the templates' special tokens in new rows, and a template."""
    shutil.copytree(tokenizer, folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    known = {token["content"]: token["id"] for token in tree["added_tokens"]}
    number = max([*known.values(), *tree["model"]["vocab"].values()]) + 1
    for token in SPECIAL:
        entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree["added_tokens"].append({"id": number, "content": token, **entry, "special": True})
        number += 1
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
