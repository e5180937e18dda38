"""A home for a user who has none: a container may be run as any user id, without an account and without HOME."""

from __future__ import annotations

import os
import pwd
import stat
import sys
from pathlib import Path

from serve_app.errors import ConfigError


def settle_home() -> None:
    """Give this process and its children a folder as HOME if the user has no account, and HOME is none to write to.

    It is the same one each time, because what Ray keeps there (its token) is for other commands too.
    """
    if _has_account() or _is_usable(Path(os.path.expanduser("~"))):
        return
    home = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"serve-app-home-{os.getuid()}"
    _make_private(home)
    os.environ["HOME"] = str(home)
    print(f"user {os.getuid()} has no home: using {home}; set HOME to have another one", file=sys.stderr)


def check_token_can_be_kept() -> None:
    """Raises ConfigError if Ray would make a token for a new cluster, and could not write it."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    home = Path.home()
    if Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token").is_file() or _is_usable(home):
        return
    raise ConfigError(
        f"Ray keeps the token of its cluster below the home of the user, and {home} is not a folder that this user "
        "can write to: set HOME to one"
    )


def _has_account() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _is_usable(folder: Path) -> bool:
    return folder.is_absolute() and os.access(folder, os.W_OK | os.X_OK)


def _make_private(folder: Path) -> None:
    """Raises ConfigError if it cannot be made, or is there already and another user's or open to others."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"HOME is not set, and {error}: set HOME to a folder that this user can write to") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"HOME is not set, and {folder} is not this user's alone: set HOME to a folder of its own")
