from __future__ import annotations

import orjson
import pytest

from serve_app.cli.bench.ceiling import Ceiling
from serve_app.cli.bench.load import Outcome, Window
from serve_app.cli.bench.measure import Measured, Scenario, Verdict, summarize
from serve_app.cli.bench.processes import Usage
from serve_app.cli.bench.report import Report, ScenarioResult, as_json, as_text
from serve_app.cli.bench.wire import Prepared


def measured(rate: float, errors: dict[str, int] | None = None) -> Measured:
    return Measured(
        texts_per_s=rate,
        tokens_per_s=rate * 50,
        requests=100,
        p50_s=0.010,
        p95_s=0.020,
        p99_s=0.030,
        errors=errors or {},
        client_cpu_s=0.5,
        server_cpu_s_per_1000_texts=12.5,
        server=Usage(10, 10**9, 200, 50),
    )


def ceiling(tokens_per_s: float) -> Ceiling:
    return Ceiling(tokens_per_s / 50, tokens_per_s, 0.1, 9.8, 0.1, 1024, "packed")


def report(*repeats: Measured, verdict: Verdict | None = None, ceilings: tuple[Ceiling, ...] = ()) -> Report:
    result = ScenarioResult(Scenario(32, 1), 10.0, repeats, verdict or Verdict(64, 0))
    return Report("http://127.0.0.1:8000/embed", "1024 texts", [result], ceilings)


def row(of: Report) -> list[str]:
    return as_text(of).splitlines()[-1].split()


def test_figures_are_medians_of_the_repeats() -> None:
    assert row(report(measured(70), measured(90), measured(71)))[:4] == ["32x1", "71.0", "70.0-90.0", "3,550"]


def test_the_share_is_of_the_mean_of_both_ceilings() -> None:
    told = report(measured(70), ceilings=(ceiling(4800), ceiling(5200)))

    assert told.share(told.results[0]) == pytest.approx(0.7)
    assert "70.0%" in row(told)


def test_a_machine_that_was_not_quiet_is_told() -> None:
    noisy, quiet = (as_text(report(measured(70), ceilings=(ceiling(5000), ceiling(after)))) for after in (3000, 4800))

    assert "keep no figure of this run" in noisy
    assert "keep no figure" not in quiet


def test_without_a_ceiling_there_is_no_share() -> None:
    assert row(report(measured(70)))[4] == "-"


def test_errors_are_counted_by_what_they_were() -> None:
    told = report(measured(70, {"429": 2}), measured(70, {"429": 1, "no answer": 4}))

    assert "3 x 429, 4 x no answer" in as_text(told)
    assert told.failed


def test_errors_are_in_the_json() -> None:
    outcomes = [Outcome(0, 0.0, 1.0, status) for status in (200, 429, 0, 429)]
    one = summarize(outcomes, [Prepared(b"", 0, 1, 5)], Window(0.0, 10.0))

    told = orjson.loads(orjson.dumps(as_json(report(one))))

    assert told["results"][0]["repeats"][0]["errors"] == {"429": 2, "no answer": 1}


def test_wrong_answers_are_told_with_their_reason() -> None:
    told = report(measured(70), verdict=Verdict(64, 2, "cosine 0.41000 with direct computation", 0.41))

    assert "32x1: 2 of 64 answers looked at are wrong, the first: cosine 0.41" in as_text(told)
    assert told.failed


def test_a_good_run_has_not_failed() -> None:
    assert not report(measured(70)).failed


def test_json_holds_every_repeat_and_the_medians() -> None:
    told = orjson.loads(orjson.dumps(as_json(report(measured(70), measured(80), ceilings=(ceiling(5000),)))))

    (scenario,) = told["results"]
    assert scenario["scenario"] == "32x1"
    assert [repeat["texts_per_s"] for repeat in scenario["repeats"]] == [70, 80]
    assert scenario["median"]["texts_per_s"] == 75
    assert scenario["share_of_ceiling"] == pytest.approx(0.75)
    assert told["ceilings"][0]["budget"] == 1024
    assert told["machine"]["cores"]
