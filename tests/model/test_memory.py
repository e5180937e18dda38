"""Memory figures, the calibrated cost of a batch, and housekeeping; the device is a fake that follows torch's stats."""

import pytest
import torch

from serve_app.errors import ConfigError
from serve_app.model.memory import (
    BytesPerBatch,
    DeviceMemory,
    Housekeeper,
    affordable_tokens,
    calibrate,
    configure_allocator,
    fit,
    from_stats,
)

GIB = 1 << 30


class Device:
    """A device whose forward of n tokens needs `fixed + per_token * n` bytes at its peak."""

    def __init__(self, fixed: int, per_token: int, weights: int = GIB, total: int = 16 * GIB) -> None:
        self.fixed, self.per_token, self.weights, self.total = fixed, per_token, weights, total
        self.peak = weights
        self.cached = 0

    def forward(self, tokens: int) -> None:
        if self.weights + self.fixed + self.per_token * tokens > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.peak = max(self.peak, self.weights + self.fixed + self.per_token * tokens)

    def reset_peak(self) -> None:
        self.peak = self.weights

    def read(self) -> DeviceMemory:
        stats = {
            "allocated_bytes.all.current": self.weights,
            "allocated_bytes.all.peak": self.peak,
            "reserved_bytes.all.current": self.weights + self.cached,
            "inactive_split_bytes.all.current": self.cached // 4,
        }
        return from_stats(stats, self.total - self.weights - self.cached, self.total)


def test_the_allocator_gets_expandable_segments_unless_configured():
    fresh: dict[str, str] = {}
    configure_allocator(fresh)
    assert fresh == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for chosen in (
        {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"},
        {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
    ):
        kept = dict(chosen)
        configure_allocator(kept)
        assert kept == chosen


def test_two_allocator_variables_are_refused():
    with pytest.raises(ConfigError, match="PYTORCH_CUDA_ALLOC_CONF"):
        configure_allocator({"PYTORCH_ALLOC_CONF": "a", "PYTORCH_CUDA_ALLOC_CONF": "b"})


def test_calibration_finds_the_cost_of_a_token():
    device = Device(fixed=50_000_000, per_token=40_000)
    cost = calibrate(device.forward, [512, 2048, 8192], device.reset_peak, device.read)
    assert cost.per_token == pytest.approx(40_000)
    assert cost.fixed == pytest.approx(50_000_000)


def test_calibration_ends_at_the_first_batch_that_does_not_fit():
    device = Device(fixed=50_000_000, per_token=40_000, total=GIB + 200_000_000)
    cost = calibrate(device.forward, [512, 1024, 2048, 4096, 8192], device.reset_peak, device.read)
    assert cost.of(2048) == pytest.approx(50_000_000 + 2048 * 40_000)
    with pytest.raises(ConfigError, match="a batch of 4096 tokens; lower max_input_tokens"):
        calibrate(device.forward, [2048, 4096], device.reset_peak, device.read)


def test_no_measured_batch_exceeds_its_estimate():
    tokens, peaks = [100, 200, 400, 800], [1_100_000, 2_900_000, 3_800_000, 8_100_000]
    cost = fit(tokens, peaks)
    for n, peak in zip(tokens, peaks, strict=True):
        assert cost.of(n) >= peak - 1


def test_fitting_needs_two_sizes():
    with pytest.raises(ValueError, match="two batches"):
        fit([128, 128], [1, 2])


def test_the_budget_fits_free_memory_with_its_reserve_and_depth():
    device = Device(fixed=0, per_token=100_000)
    tokens = affordable_tokens(BytesPerBatch(0, 100_000), device.read(), reserve=0.1, depth=2, longest_input=512)
    used = 2 * tokens * 100_000 + device.weights
    assert used <= 0.9 * device.total
    assert used + 2 * 100_000 > 0.9 * device.total - 1


def test_a_process_with_a_share_of_the_device_has_that_much_and_no_more():
    device = Device(fixed=0, per_token=1)
    device.cached = GIB
    whole = device.read()
    shared = whole.within(4 * GIB)
    assert (shared.total_bytes, shared.free_bytes, shared.available_bytes) == (4 * GIB, 2 * GIB, 3 * GIB)
    assert whole.within(64 * GIB) == whole
    assert whole.within(GIB).free_bytes == 0


def test_cached_memory_counts_as_available():
    device = Device(fixed=0, per_token=1)
    before = device.read().available_bytes
    device.cached = 5 * GIB
    assert device.read().available_bytes == before


def test_a_model_whose_longest_input_cannot_fit_is_refused_at_start():
    device = Device(fixed=0, per_token=100_000_000)
    with pytest.raises(ConfigError, match="longest input"):
        affordable_tokens(BytesPerBatch(0, 100_000_000), device.read(), reserve=0.1, depth=1, longest_input=512)


def test_fragmentation_and_slack_are_shares_of_reserved_memory():
    device = Device(fixed=0, per_token=1)
    assert (device.read().fragmentation, device.read().slack) == (0.0, 0.0)
    device.cached = GIB
    assert device.read().slack == pytest.approx(0.5)
    assert device.read().fragmentation == pytest.approx(0.125)
    assert from_stats({}, 1, 1).figures()["slack"] == 0


def test_memory_is_given_back_only_when_much_is_slack_and_not_often():
    device, given_back, now = Device(fixed=0, per_token=1), [], [0.0]
    keeper = Housekeeper(device.read, lambda: given_back.append(now[0]), clock=lambda: now[0])
    assert not keeper.idle()
    device.cached = GIB
    assert not keeper.idle(), "too soon after the last look"
    now[0] = 31
    assert keeper.idle()
    now[0] = 40
    assert not keeper.idle()
    assert given_back == [31]
