"""Processes that measure apart from the one that asks: gone, with their memory, when they have answered.

A child reads one JSON command a line and answers each with one line, so that several can be made to start at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from serve_app.errors import ServeAppError

Command: TypeAlias = Mapping[str, Any]


class ChildError(ServeAppError):
    """A child ended without an answer."""


class Children:
    """`count` processes of `module`, each with its own number as last argument, all ready before any is asked."""

    def __init__(self, module: str, argument: str, count: int, threads: int) -> None:
        share = str(threads)
        environment = os.environ | {"OMP_NUM_THREADS": share, "RAYON_NUM_THREADS": share}
        environment["TOKENIZERS_PARALLELISM"] = "true"
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, argument, str(number)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def __enter__(self) -> Children:
        try:
            for process in self._processes:
                _read(process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait()

    def ask(self, *commands: Command) -> list[Any]:
        """One command for all, or one for each; answers when all have answered. Raises ChildError."""
        each: Sequence[Command] = commands if len(commands) == len(self._processes) else commands * len(self._processes)
        for process, command in zip(self._processes, each, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        return [_read(process) for process in self._processes]


def _read(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ChildError(f"a process that measures ended with status {process.wait()}; see above")
    return json.loads(line)


def answer_commands(prepare: Callable[[], Callable[[Command], Any]]) -> None:
    """The child's side: get ready, say so, then answer commands until stdin is closed."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # what libraries print must not get between the answers
    answer = prepare()
    print("{}", file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)
