from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from serve_app.cli.main import main
from serve_app.cli.profile import Layout, LengthCost, Profile, as_text
from serve_app.cli.profile_picture import draw

PROFILE = Profile(
    model="bert of 384, cut at 256 tokens",
    attention="packed",
    tokens_per_text=56.0,
    tokenize_tokens_per_s=300_000,
    lengths=(LengthCost(64, 0.0002, 0.020, 0.030), LengthCost(256, 0.0008, 0.090, 0.1)),
    budgets={512: 2800, 1024: 2950, 2048: 3000, 4096: 2900},
    layouts=(Layout(2, 1, 6000), Layout(1, 2, 5000)),
)


def test_the_smallest_budget_that_is_about_as_fast_is_advised() -> None:
    assert PROFILE.best_budget == 1024
    assert replace(PROFILE, budgets={512: 2000, 1024: 2950}).best_budget == 1024


def test_the_fastest_layout_is_advised() -> None:
    assert PROFILE.best_layout == Layout(2, 1, 6000)


def test_tokenizer_cores_follow_from_the_speed_of_one_model_replica() -> None:
    assert PROFILE.tokenizers_per_model_replica == pytest.approx(3000 / 300_000)
    assert "one core for every 100" in as_text(PROFILE)


def test_shares_of_the_time_are_those_of_one_thread() -> None:
    assert PROFILE.tokenize_share == pytest.approx((1 / 300_000) / (1 / 300_000 + 1 / 2950))


def test_the_text_tells_each_length_budget_and_layout() -> None:
    lines = [line.split() for line in as_text(PROFILE).splitlines()]

    assert ["64", "3.12", "312.5", "30.00"] in lines
    assert ["2048", "3,000"] in lines
    assert ["1", "x", "2", "5,000"] in lines


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    draw(PROFILE, tmp_path / "profile.png")

    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_a_real_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "out.png"

    status = main(
        [
            "profile",
            "--texts",
            "8",
            "--cores",
            "1",
            "--budgets",
            "128,256,512",
            "--json",
            str(file),
            "--png",
            str(picture),
        ]
    )

    assert status == 0
    told = orjson.loads(file.read_bytes())
    assert set(told["budgets"]) == {"256", "512"}  # 128 is below the longest input
    assert [cost["tokens"] for cost in told["lengths"]] == [8, 16, 32, 64, 128, 256]
    assert all(cost["tokenize_s"] < cost["forward_s"] for cost in told["lengths"])
    assert told["tokenize_tokens_per_s"] > told["budgets"]["512"] > 0
    assert told["layouts"][0]["replicas"] == told["layouts"][0]["threads"] == 1
    assert told["advice"]["max_batch_tokens"] in (256, 512)
    assert "max_batch_tokens: " in capsys.readouterr().out
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "many"], "--budgets: 'many'"),
        (["--budgets", "64,128"], "below the longest input, 256 tokens"),
        (["--model-path", "no/such/folder"], "--model-path"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *arguments]) == 1
    assert message in capsys.readouterr().err
