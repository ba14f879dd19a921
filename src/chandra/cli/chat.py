"""The chat of `chandra run`: commands as Ollama's users know them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from chandra.cli.run import answer, open_model, print_stats
from chandra.cli.sampling import known_sampling, parse_sampling
from chandra.cli.store import describe, listing, open_store
from chandra.cli.tables import memory_table, plan_table
from chandra.config import SamplingParams, Settings
from chandra.errors import ChandraError, UsageError
from chandra.llm import LLM

HELP = """\
/set parameter NAME VALUE   change a sampling value    /set system TEXT       change the system message
/set history | nohistory    keep typed lines or not    /set wordwrap | nowordwrap
/set verbose | quiet        print rates after answers  /show info | license | modelfile | parameters | template | system
/load NAME                  change model or session    /save NAME             keep model and conversation
/list                       models in the store        /clear, /reset         forget the conversation
/plan  /stats               what was planned; memory   /bye                   leave
\"\"\"                         begins and ends a message of several lines; Ctrl-C stops an answer, Ctrl-D leaves"""


class Chat:
    """One conversation on a terminal."""

    def __init__(self, llm: LLM, arguments: argparse.Namespace, sampling: dict[str, Any]) -> None:
        self.llm, self.arguments, self.sampling = llm, arguments, sampling
        self.settings = Settings.from_env()
        self.system: str | None = arguments.system or llm.runtime.stored.system
        self.messages: list[dict[str, str]] = [dict(message) for message in llm.runtime.stored.messages]
        self.session: PromptSession[str] = PromptSession(history=self._history(self.settings.history))
        self.stats: Any = None
        self.commands: dict[str, Callable[[str], None]] = {
            "set": self._set,
            "show": self._show,
            "load": self._load,
            "save": self._save,
            "list": lambda _: print(listing(open_store(self.settings))),
            "clear": self._clear,
            "reset": self._clear,
            "plan": lambda _: print(plan_table(self.llm.plan)),
            "stats": self._print_stats,
            "?": lambda _: print(HELP),
            "help": lambda _: print(HELP),
        }

    def loop(self) -> int:
        """Read and answer until /bye or end of input."""
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                print("Use Ctrl-D or /bye to leave.")
                continue
            except EOFError:
                return 0
            if line.strip() in ("/bye", "/exit"):
                return 0
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._answer(line)
            except ChandraError as error:
                print(error)
            except KeyboardInterrupt:
                print()

    def _read(self) -> str:
        hint = FormattedText([("class:placeholder ansibrightblack", "Send a message (/? for help)")])
        line = self.session.prompt(">>> ", placeholder=hint)
        if not line.lstrip().startswith('"""'):
            return line
        lines = [line.lstrip().removeprefix('"""')]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(self.session.prompt("... "))
        return "\n".join(lines).rstrip().removesuffix('"""')

    def _answer(self, line: str) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.messages, {"role": "user", "content": line}]
        prompt: Any = line if self.llm.runtime.base_model else [*system, *asked]
        text, stats = answer(self.llm, prompt, SamplingParams(**self.sampling), self.arguments)
        self.messages = [*asked, {"role": "assistant", "content": text}]
        self.stats = stats or self.stats
        if self.arguments.verbose:
            print_stats(stats, self.llm)

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self.commands:
            raise UsageError(f"unknown command /{name}", "/? lists the commands")
        self.commands[name](rest.strip())

    def _set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        if what == "parameter":
            self._set_parameter(*value.partition(" ")[::2])
        elif what == "system":
            self.system = value.strip().strip('"') or None
            print("System message set." if self.system else "System message removed.")
        elif what in ("history", "nohistory"):
            self.session.history = self._history(what == "history")
        elif what in ("wordwrap", "nowordwrap"):
            self.arguments.nowordwrap = what == "nowordwrap"
        elif what in ("verbose", "quiet"):
            self.arguments.verbose = what == "verbose"
        elif what in ("format", "noformat", "think", "nothink"):
            raise UsageError(f"/set {what} is not available yet")
        else:
            raise UsageError(f"/set {what or '…'} is not known", "/? lists the commands")

    def _set_parameter(self, name: str, value: str) -> None:
        if name == "num_ctx":
            raise UsageError("the context length is part of the plan", "start again with --ctx TOKENS")
        name, changed = parse_sampling(name, value)
        SamplingParams(**{**self.sampling, name: changed})  # refuses values out of range
        self.sampling[name] = changed
        print(f"Set {name} to {changed!r}.")

    def _show(self, part: str) -> None:
        runtime = self.llm.runtime
        if part in ("", "info"):
            print(describe(runtime.stored))
        elif part == "parameters":
            print("\n".join(f"{name:<20} {value}" for name, value in self.sampling.items()))
        elif part == "system":
            print(self.system or "No system message.")
        elif part == "template":
            print(runtime.template.source)
        elif part in ("license", "modelfile"):
            print(describe(runtime.stored, part))
        else:
            raise UsageError(f"/show {part} is not known", "/? lists the commands")

    def _load(self, name: str) -> None:
        if not name:
            raise UsageError("/load needs the name of a model")
        loaded = open_model(argparse.Namespace(**{**vars(self.arguments), "model": name}))
        self.llm.close()
        self.llm = loaded
        stored = loaded.runtime.stored
        self.system = stored.system
        self.messages = [dict(message) for message in stored.messages]
        self.sampling |= known_sampling(stored.params)

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs a name")
        session = dataclasses.replace(
            self.llm.runtime.stored, system=self.system, params=self.sampling, messages=tuple(self.messages)
        )
        open_store(self.settings).save(session, name)
        print(f"Saved as {name}.")

    def _clear(self, _: str) -> None:
        self.messages = []
        print("Forgot the conversation.")

    def _print_stats(self, _: str) -> None:
        print_stats(self.stats, self.llm) if self.stats else print(memory_table(self.llm.memory()))

    def _history(self, keep: bool) -> History:
        if not keep:
            return InMemoryHistory()
        with contextlib.suppress(OSError):
            self.settings.home.mkdir(parents=True, exist_ok=True)
            return FileHistory(str(self.settings.home / "history"))
        return InMemoryHistory()
