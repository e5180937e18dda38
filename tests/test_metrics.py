"""Every metric can be made, and says what it counts in words that Ray's exporter takes."""

import dataclasses

import pytest

from serve_app import metrics

GROUPS = [c for c in vars(metrics).values() if dataclasses.is_dataclass(c) and c.__module__ == metrics.__name__]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_metrics_can_be_made(group: type):
    made = group()
    for field in dataclasses.fields(made):
        metric = getattr(made, field.name)
        assert metric.info["description"].isascii(), field.name
        assert metric.info["name"].startswith("serve_app_")
