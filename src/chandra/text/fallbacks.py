"""Chat templates for models that bring none, chosen by the control tokens they know."""

from __future__ import annotations

from chandra.text.tokenizer import Tokenizer


def _chat(message: str, prompt: str, start: str = "''") -> str:
    return (
        f"{{{{ {start} }}}}{{% for m in messages %}}{{{{ {message} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )


CHATML = _chat(r"'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'", r"'<|im_start|>assistant\n'")
LLAMA3 = _chat(
    r"'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>'",
    r"'<|start_header_id|>assistant<|end_header_id|>\n\n'",
    "bos_token",
)
GEMMA = _chat(
    r"'<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content|trim + '<end_of_turn>\n'",
    r"'<start_of_turn>model\n'",
    "bos_token",
)
PHI3 = _chat(r"'<|' + m.role + '|>\n' + m.content + '<|end|>\n'", r"'<|assistant|>\n'")
ZEPHYR = _chat(r"'<|' + m.role + '|>\n' + m.content + eos_token + '\n'", r"'<|assistant|>\n'")
MISTRAL = _chat(
    "m.content + eos_token if m.role == 'assistant' else '[INST] ' + m.content + ' [/INST]'", "''", "bos_token"
)
PLAIN = _chat(
    r"{'system': '', 'assistant': '### Response:\n'}.get(m.role, '### Instruction:\n') + m.content + '\n\n'",
    r"'### Response:\n'",
)
_BY_TOKEN = {
    "<|im_start|>": CHATML,
    "<|start_header_id|>": LLAMA3,
    "<start_of_turn>": GEMMA,
    "<|end|>": PHI3,
    "<|assistant|>": ZEPHYR,
    "[INST]": MISTRAL,
}


def fallback_template(tokenizer: Tokenizer, arch: str) -> str:
    """A Jinja template for a model without one: by its control tokens, then its architecture, else a plain one."""
    known = (template for token, template in _BY_TOKEN.items() if tokenizer.find(token) is not None)
    return next(known, MISTRAL if arch == "mistral" else PLAIN)
