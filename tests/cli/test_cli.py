"""The command line: exit codes, errors without traceback, one-shot answers, pipes, and the chat on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CHANDRA = [sys.executable, "-m", "chandra"]


def run(*arguments: str, home: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CHANDRA_HOME": str(home)}
    return subprocess.run(
        [*CHANDRA, *arguments], input=stdin, capture_output=True, text=True, env=environment, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--version"], 0, "chandra"),
        (["list"], 0, "The store is empty"),
        (["list", "--all"], 0, "smollm2:135m"),
        (["run", "nosuch:1b", "hi"], 1, "not found"),
        (["run", "./nosuch.gguf", "hi"], 1, "nosuch.gguf"),
        (["run", "../../etc/passwd:x", "hi"], 1, "passwd"),
        (["run", __file__, "hi"], 1, "is not a model file"),
        (["run", "smollm2:135m", "hi", "--ctx", "many"], 2, "invalid int"),
        (["run", "smollm2:135m", "--nosuch"], 2, "unrecognized"),
        (["run", "nosuch:1b", "--seed", "1", "a prompt after options"], 1, "not found"),
        (["list", "--all", "more"], 2, "unrecognized"),
        (["plan", "llama2:7b", "--device", "cuda:7=8GiB"], 1, "cuda:7"),
        (["rm", "nosuch"], 1, "not found"),
        (["plan", "llama2:70b", "--device", "8GiB", "--host", "4GiB"], 3, "does not fit"),
        (["plan", "llama2:7b", "--device", "8GiB", "--layers", "cuda:3=0-4"], 2, "cuda:3"),
        (["plan", "llama2:7b", "--device", "six"], 2, "not a device"),
        (["frobnicate"], 2, "invalid choice"),
    ],
)
def test_exit_codes_and_messages(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = run(*arguments, home=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_terms_are_shown_before_a_download(tmp_path: Path) -> None:
    done = run("run", "gemma3:270m", "hi", home=tmp_path)
    assert done.returncode == 2
    assert "Terms of Use" in done.stderr
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.model
class TestWithAModel:
    @pytest.fixture
    def model(self, model_file: Callable[[str], Path]) -> str:
        return str(model_file("smollm2:135m"))

    def test_greedy_answers_repeat(self, model: str, tmp_path: Path) -> None:
        options = ("--temperature", "0", "--max-tokens", "24", "--ctx", "256")
        first, second = (run("run", model, "Why is the sky blue?", *options, home=tmp_path) for _ in range(2))
        assert first.returncode == 0, first.stderr
        assert first.stdout == second.stdout
        assert len(first.stdout.split()) > 8

    def test_input_comes_from_a_pipe(self, model: str, tmp_path: Path) -> None:
        done = run(
            *("run", model, "--temperature", "0", "--max-tokens", "8", "--ctx", "256", "--verbose"),
            home=tmp_path,
            stdin="Say hello.",
        )
        assert done.returncode == 0
        assert done.stdout.strip()
        assert re.search(r"eval rate: +[\d.]+ tokens/s", done.stderr)
        assert re.search(r"cpu +weights +\d", done.stderr)
        assert run("run", model, home=tmp_path).returncode == 2  # an empty pipe is no prompt

    def test_a_prompt_longer_than_the_context_is_refused(self, model: str, tmp_path: Path) -> None:
        done = run("run", model, "word " * 300, "--ctx", "128", home=tmp_path)
        assert done.returncode == 2
        assert "context" in done.stderr

    def test_too_small_a_budget_is_refused_with_what_would_do(self, model: str, tmp_path: Path) -> None:
        done = run("run", model, "hi", "--budget", "100MiB", home=tmp_path)
        assert done.returncode == 3
        assert "it would" in done.stderr

    def test_cp_show_and_rm(self, model: str, tmp_path: Path) -> None:
        assert run("cp", model, "mine:1", home=tmp_path).returncode == 0
        assert "mine:1" in run("list", home=tmp_path).stdout
        assert "llama" in run("show", "mine:1", home=tmp_path).stdout
        assert "FROM" in run("show", "mine:1", "--modelfile", home=tmp_path).stdout
        assert "token_embd.weight" in run("show", model, "-v", home=tmp_path).stdout
        assert run("rm", "mine:1", home=tmp_path).returncode == 0
        assert "mine:1" not in run("list", home=tmp_path).stdout
        assert Path(model).exists()

    def test_the_chat(self, model: str, tmp_path: Path) -> None:
        with Terminal("run", model, "--temperature", "0", "--max-tokens", "12", "--ctx", "512", home=tmp_path) as chat:
            chat.expect(">>> ")
            chat.say('/set system "You are short."')
            chat.expect("System message set.")
            chat.say("Hello")
            chat.expect(">>> ")
            chat.say('"""two')
            chat.expect(r"\.\.\. ")
            chat.say('lines"""')
            chat.expect(">>> ")
            chat.say("/set parameter num_predict 3")
            chat.expect("Set max_tokens to 3")
            chat.say("/nosuch")
            chat.expect("unknown command")
            chat.say("/save session")
            chat.expect("Saved as session")
            chat.say("/reset")
            chat.expect("Forgot")
            chat.say("/load session")
            chat.expect(">>> ")
            chat.say("/show system")
            chat.expect("You are short.")
            chat.say("/bye")
            assert chat.wait() == 0

    def test_ctrl_c_stops_the_answer_not_the_program(self, model: str, tmp_path: Path) -> None:
        with Terminal("run", model, "--temperature", "0", "--ctx", "4096", home=tmp_path) as chat:
            chat.expect(">>> ")
            chat.say("Write a very long story about the sea.")
            chat.expect("sea")
            time.sleep(1)
            chat.send(b"\x03")
            chat.expect(">>> ")
            chat.say("/show info")
            chat.expect("architecture")
            chat.say("/bye")
            assert chat.wait() == 0


class Terminal:
    """A pseudo-terminal with `chandra` in it."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "CHANDRA_HOME": str(home), "TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [*CHANDRA, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=_control_terminal,  # so that Ctrl-C reaches it
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def send(self, data: bytes) -> None:
        os.write(self.master, data)

    def say(self, line: str) -> None:
        self.seen = ""
        self.send(line.encode() + b"\r")
        self.expect(re.escape(line[-6:]))  # its echo

    def expect(self, pattern: str, seconds: float = 60) -> None:
        """Read until the pattern comes; what is before its end is forgotten."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], 1)
            if ready:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            assert time.monotonic() < deadline, f"{pattern!r} did not come; seen: {self.seen!r}"
        self.seen = self.seen[found.end() :]

    def wait(self) -> int:
        return self.process.wait(timeout=20)


def _control_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
