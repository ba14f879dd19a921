"""`chandra run MODEL [PROMPT]`: answer once, or chat."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from chandra.cli.options import add_memory_options, memory_request
from chandra.cli.progress import ProgressLine
from chandra.cli.sampling import add_sampling_options, sampling_of
from chandra.cli.store import fetch, open_store
from chandra.cli.tables import memory_table
from chandra.cli.wrap import AnswerWriter
from chandra.config import SamplingParams, Settings
from chandra.errors import UsageError
from chandra.llm import DEFAULT_MODEL, LLM, Stats


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register `run` on an argparse subparsers action."""
    run = commands.add_parser("run", parents=[common], help="answer a prompt, or chat")
    run.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"a name or a path (default: {DEFAULT_MODEL})")
    run.add_argument("prompt", nargs="*", help="without one: the input of a pipe, or a chat on a terminal")
    run.add_argument("--system", help="system message")
    run.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    run.add_argument("--verbose", action="store_true", help="print token counts, rates and memory at the end")
    run.add_argument("--nowordwrap", action="store_true", help="do not break lines between words")
    run.add_argument("--accept-license", action="store_true", help="do not ask about the model's terms")
    add_sampling_options(run)
    add_memory_options(run)
    run.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    prompt = " ".join(arguments.prompt)
    if not sys.stdin.isatty():
        piped = sys.stdin.read()
        prompt = f"{prompt}\n\n{piped}" if prompt and piped else prompt or piped
        if not prompt.strip():
            raise UsageError("there is no prompt", "give one after the model's name, or pipe it in")
    with open_model(arguments) as llm:
        stored = llm.runtime.stored
        sampling = sampling_of(arguments, stored.params)
        if not prompt:
            from chandra.cli.chat import Chat

            return Chat(llm, arguments, sampling).loop()
        params = SamplingParams(**sampling)
        system = arguments.system or stored.system
        said = [{"role": "system", "content": system}] if system else []
        messages = [*said, *stored.messages, {"role": "user", "content": prompt}]
        stats = answer(llm, prompt if arguments.raw or llm.runtime.base_model else messages, params, arguments)[1]
        if arguments.verbose:
            print_stats(stats, llm)
    return 0


def open_model(arguments: argparse.Namespace) -> LLM:
    """Fetch the model if need be and load it, with progress."""
    settings = Settings.from_env()
    stored = fetch(open_store(settings), arguments.model, arguments.accept_license)
    with ProgressLine() as progress:
        llm = LLM(stored, progress=progress, **memory_request(arguments))
    if llm.runtime.base_model and not getattr(arguments, "raw", False):
        print(f"{llm.name} is a base model without a chat template: it continues the text", file=sys.stderr)
    return llm


def answer(llm: LLM, prompt: Any, params: SamplingParams, arguments: argparse.Namespace) -> tuple[str, Stats | None]:
    """Print an answer as it comes; the text and what it took. Ctrl-C ends the answer, keeping what has come."""
    writer = AnswerWriter(sys.stdout, wrap=not arguments.nowordwrap)
    text, stats = "", None
    stream = llm.stream(prompt, params)
    try:
        for chunk in stream:
            writer.write(chunk.text)
            text, stats = text + chunk.text, chunk.stats
    except KeyboardInterrupt:
        stream.close()  # type: ignore[attr-defined]
        if not sys.stdin.isatty():
            raise
    finally:
        writer.finish()
        print(flush=True)
    return text, stats


def print_stats(stats: Stats | None, llm: LLM) -> None:
    """Counts and rates, then predicted against actual memory, on stderr."""
    if stats is None:
        return

    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:.2f} tokens/s" if seconds > 0 else "-"

    total = stats.prompt_seconds + stats.generated_seconds
    rows = [
        ("total duration", f"{total + stats.load_seconds:.3f} s"),
        ("load duration", f"{stats.load_seconds:.3f} s"),
        ("prompt eval count", f"{stats.prompt_tokens} tokens"),
        ("prompt eval duration", f"{stats.prompt_seconds:.3f} s"),
        ("prompt eval rate", rate(stats.prompt_tokens, stats.prompt_seconds)),
        ("eval count", f"{stats.generated_tokens} tokens"),
        ("eval duration", f"{stats.generated_seconds:.3f} s"),
        ("eval rate", rate(max(0, stats.generated_tokens - 1), stats.generated_seconds)),
    ]
    for name, value in rows:
        print(f"{name + ':':<22}{value}", file=sys.stderr)
    print(memory_table(llm.memory()), file=sys.stderr)
    for step in llm.pressure():
        print(f"memory pressure: {step}", file=sys.stderr)
