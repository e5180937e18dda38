"""`serve-app <command>`: each command is a module with `add_arguments(parser)` and `run(args)`, loaded when chosen."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from serve_app.cli.home import settle_home
from serve_app.errors import ServeAppError

COMMANDS = {
    "init": ("serve_app.cli.init", "write a serve_config.yaml for these models, that fits this machine or its GPUs"),
    "serve": ("serve_app.cli.serve", "check a serve_config.yaml, run it with `serve run`, and say when it is ready"),
    "check": ("serve_app.cli.check", "check a serve_config.yaml in seconds, without starting anything"),
    "deploy": ("serve_app.cli.deploy", "put an edited serve_config.yaml into force on a running server, and watch it"),
    "status": ("serve_app.cli.status", "say how the applications of a running server fare"),
    "bench": ("serve_app.cli.bench.command", "measure a running server against what its hardware can do"),
    "profile": ("serve_app.cli.profile", "where a model's time goes, and the settings that suit this machine"),
    "key": ("serve_app.cli.key", "make an API key"),
    "prewarm": ("serve_app.cli.prewarm", "bring a model's files to every node before they are needed"),
}

INTERRUPTED = 130
"""What a shell reports for a command that Ctrl-C ended."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        settle_home()
        return _dispatch(arguments)
    except ServeAppError as error:
        print(f"serve-app: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="serve-app", description="Serve Hugging Face models on Ray Serve.")
    subparsers = parser.add_subparsers(metavar="command", dest="command", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, help_) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        if name == chosen:
            importlib.import_module(module).add_arguments(subparser)
    args = parser.parse_args(arguments)
    command = importlib.import_module(COMMANDS[args.command][0])
    with ExitStack() as stack:
        for name in ("config", "serve"):  # files that commands read
            path = getattr(args, name, None)
            if isinstance(path, Path):
                from serve_app.cli.init import complete

                setattr(args, name, stack.enter_context(complete(path)))
        return int(command.run(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
