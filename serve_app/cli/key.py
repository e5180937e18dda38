"""`serve-app key new <name>`: a new API key, and the line for the list of keys."""

from __future__ import annotations

import argparse
import re
from typing import get_args

from serve_app.errors import ConfigError
from serve_app.ingress.keys import ROLES, Key, digest_of, new_key, read_keys
from serve_app.types import Priority


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["new"], help="make a key")
    parser.add_argument("name", help="who uses it; stands in logs")
    parser.add_argument("--role", action="append", choices=ROLES, help="what it may ask, may be repeated (inference)")
    parser.add_argument("--requests-per-minute", type=int, help="quota in each ingress replica")
    parser.add_argument("--tokens-per-minute", type=int, help="quota in each ingress replica")
    parser.add_argument(
        "--priority", choices=get_args(Priority), default="interactive", help="bulk: its requests let others go first"
    )


def run(args: argparse.Namespace) -> int:
    secret = new_key()
    roles = frozenset(args.role or ["inference"])
    quotas = args.requests_per_minute, args.tokens_per_minute
    key = Key(args.name, digest_of(secret.encode()), roles, *quotas, args.priority)
    try:
        read_keys(key.line, "key")
    except ConfigError as error:
        raise ConfigError(re.sub("^key: line 1: ", "", error.message)) from None
    print(f"The key, shown only now:\n{secret}\n\nThe line for the list of keys:\n{key.line}")
    return 0
