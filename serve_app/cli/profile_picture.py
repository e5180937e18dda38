"""A profile as a picture of four charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from serve_app.cli.profile_result import Profile

matplotlib.use("Agg")  # no display is needed, or looked for

from matplotlib import pyplot  # after the choice above

_FORWARD, _TOKENIZE, _BEST = "#2b6cb0", "#dd6b20", "#2f855a"


def draw(profile: Profile, file: Path) -> None:
    """Write the picture; its format is that of the file's name."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(profile.model)
    _costs(axes[0][0], profile)
    _alone(axes[0][1], profile)
    _budgets(axes[1][0], profile)
    _layouts(axes[1][1], profile)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _costs(axis: Any, profile: Profile) -> None:
    tokens = [cost.tokens for cost in profile.lengths]
    axis.plot(tokens, [cost.forward_us_per_token for cost in profile.lengths], "o-", color=_FORWARD, label="forward")
    axis.plot(tokens, [cost.tokenize_us_per_token for cost in profile.lengths], "o-", color=_TOKENIZE, label="tokenize")
    axis.set(title="One token, in full batches", xlabel="tokens of a text", ylabel="µs a token")
    _lengths(axis, tokens)
    axis.set_yscale("log")
    axis.legend()


def _alone(axis: Any, profile: Profile) -> None:
    tokens = [cost.tokens for cost in profile.lengths]
    axis.plot(tokens, [c.alone_s * 1e3 for c in profile.lengths], "o-", color=_FORWARD, label="alone")
    axis.plot(tokens, [c.forward_s * 1e3 for c in profile.lengths], "o--", color=_FORWARD, label="in a full batch")
    axis.set(title="One text, forward", xlabel="tokens of the text", ylabel="ms")
    _lengths(axis, tokens)
    axis.legend()


def _lengths(axis: Any, tokens: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(length) for length in tokens])


def _budgets(axis: Any, profile: Profile) -> None:
    names = [str(budget) for budget in profile.budgets]
    colors = [_BEST if budget == profile.best_budget else _FORWARD for budget in profile.budgets]
    axis.bar(names, list(profile.budgets.values()), color=colors)
    axis.set(title="Mixed lengths in order of arrival", xlabel="max_batch_tokens", ylabel="tokens/s on one thread")


def _layouts(axis: Any, profile: Profile) -> None:
    names = [f"{layout.replicas} x {layout.threads}" for layout in profile.layouts]
    colors = [_BEST if layout is profile.best_layout else _FORWARD for layout in profile.layouts]
    axis.bar(names, [layout.tokens_per_s for layout in profile.layouts], color=colors)
    axis.set(title="All cores", xlabel="replicas x threads", ylabel="tokens/s together")
