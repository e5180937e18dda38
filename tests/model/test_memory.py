"""Memory figures, the calibrated cost of a batch, and housekeeping; the device is a fake that follows torch's stats."""

import os
import subprocess
import sys

import pytest
import torch

from serve_app.errors import ConfigError
from serve_app.model.memory import (
    KERNEL_CACHE,
    KERNELS,
    BytesPerBatch,
    DeviceMemory,
    HostHeap,
    Housekeeper,
    affordable_batch,
    bound_kernel_cache,
    calibrate,
    configure_allocator,
    fit,
    from_stats,
)

GIB = 1 << 30


class Device:
    """A device whose forward needs `fixed + per_token * tokens + per_sequence * sequences` bytes at its peak."""

    def __init__(
        self, fixed: int, per_token: int, per_sequence: int = 0, weights: int = GIB, total: int = 16 * GIB
    ) -> None:
        self.fixed, self.per_token, self.per_sequence = fixed, per_token, per_sequence
        self.weights, self.total = weights, total
        self.peak = weights
        self.cached = 0

    def forward(self, lengths: list[int]) -> None:
        needed = self.fixed + self.per_token * sum(lengths) + self.per_sequence * len(lengths)
        if self.weights + needed > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.peak = max(self.peak, self.weights + needed)

    def calibrate(self, longest: int = 512) -> BytesPerBatch:
        return calibrate(self.forward, longest, self.reset_peak, self.read)

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
    cost = Device(fixed=50_000_000, per_token=40_000).calibrate()
    assert cost.per_token == pytest.approx(40_000)
    assert cost.fixed == pytest.approx(50_000_000)
    assert cost.per_sequence == pytest.approx(0, abs=1)


@pytest.mark.parametrize("sequences", [1, 100, 512, 2000])
@pytest.mark.parametrize("tokens", [2000, 30_000])
def test_calibration_finds_the_cost_of_a_sequence(tokens: int, sequences: int):
    """A row over a vocabulary of 250,000 in float32, three times; a token costs far less."""
    device = Device(fixed=50_000_000, per_token=40_000, per_sequence=3_000_000)
    needed = 50_000_000 + 40_000 * tokens + 3_000_000 * sequences
    assert needed <= device.calibrate().of(tokens, sequences) <= 1.2 * needed


def test_calibration_ends_at_the_first_batch_that_does_not_fit():
    device = Device(fixed=50_000_000, per_token=40_000, total=GIB + 200_000_000)
    cost = device.calibrate()
    assert cost.of(2048) == pytest.approx(50_000_000 + 2048 * 40_000)
    with pytest.raises(ConfigError, match="a batch of 4096 tokens in 2 sequences; lower max_input_tokens"):
        device.calibrate(2048)


def test_no_measured_batch_exceeds_its_estimate():
    tokens, peaks = [100, 200, 400, 800], [1_100_000, 2_900_000, 3_800_000, 8_100_000]
    cost = fit(tokens, peaks)
    for n, peak in zip(tokens, peaks, strict=True):
        assert cost.of(n) >= peak - 1


def test_fitting_needs_two_sizes():
    with pytest.raises(ValueError, match="two batches"):
        fit([128, 128], [1, 2])


def test_one_batch_may_have_all_free_memory_but_the_reserve():
    device = Device(fixed=0, per_token=100_000)
    tokens, sequences = affordable_batch(
        BytesPerBatch(0, 100_000), device.read(), reserve=0.1, longest_input=512, max_sequences=512
    )
    used = tokens * 100_000 + device.weights
    assert used <= 0.9 * device.total < used + 100_000
    assert sequences == 512


@pytest.mark.parametrize("max_sequences", [1, 64, 512, 5000])
@pytest.mark.parametrize("total", [2 * GIB, 4 * GIB, 16 * GIB])
def test_a_full_batch_fits_whatever_number_of_sequences_it_has(total: int, max_sequences: int):
    device = Device(fixed=50_000_000, per_token=40_000, per_sequence=3_000_000, total=total)
    tokens, sequences = affordable_batch(device.calibrate(), device.read(), 0.1, 512, max_sequences)
    assert 1 <= sequences <= max_sequences
    assert tokens >= 512
    device.forward([tokens - sequences + 1, *[1] * (sequences - 1)])
    assert device.peak <= 0.9 * total


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
        affordable_batch(BytesPerBatch(0, 100_000_000), device.read(), 0.1, longest_input=512, max_sequences=512)


def test_fragmentation_and_slack_are_shares_of_reserved_memory():
    device = Device(fixed=0, per_token=1)
    assert (device.read().fragmentation, device.read().slack) == (0.0, 0.0)
    device.cached = GIB
    assert device.read().slack == pytest.approx(0.5)
    assert device.read().fragmentation == pytest.approx(0.125)
    assert from_stats({}, 1, 1).figures()["slack"] == 0


def test_memory_is_given_back_only_when_much_is_unused_and_not_often():
    unused, given_back, now = [False], [], [0.0]
    keeper = Housekeeper(lambda: unused[0], lambda: given_back.append(now[0]), clock=lambda: now[0])
    assert not keeper.idle()
    unused[0] = True
    assert not keeper.idle(), "too soon after the last look"
    now[0] = 31
    assert keeper.idle()
    now[0] = 40
    assert not keeper.idle()
    assert given_back == [31]


def test_a_heap_is_trimmed_when_it_has_grown_since_the_last_time():
    resident, trimmed = [300 << 20], []

    def trim() -> None:
        trimmed.append(resident[0])
        resident[0] = 200 << 20

    heap = HostHeap(lambda: resident[0], trim)
    assert heap.much_is_unused(), "what loading has freed"
    heap.give_back()
    assert not heap.much_is_unused()
    resident[0] = 260 << 20
    assert not heap.much_is_unused()
    resident[0] = 270 << 20
    assert heap.much_is_unused()
    assert trimmed == [300 << 20]


def test_a_heap_that_cannot_be_trimmed_is_not_trimmed_again():
    heap = HostHeap(lambda: 900 << 20, lambda: None)
    assert heap.much_is_unused()
    heap.give_back()
    assert not heap.much_is_unused()


def test_oneDNN_keeps_few_kernels_unless_the_operator_has_said_how_many():
    fresh: dict[str, str] = {}
    bound_kernel_cache(fresh)
    assert fresh == {KERNEL_CACHE: KERNELS}
    chosen = {KERNEL_CACHE: "300"}
    bound_kernel_cache(chosen)
    assert chosen == {KERNEL_CACHE: "300"}


KERNELS_OF_MANY_SHAPES = """
import sys
from serve_app.model import memory
if sys.argv[1] == "bounded":
    memory.bound_kernel_cache()
import torch
from serve_app.model.linear import Activation, OneDnnLinear
with torch.inference_mode():
    linear = OneDnnLinear(torch.nn.Linear(32, 32), Activation())
    for rows in [8, *range(16, 16 * 120, 16), 8]:
        linear._project(torch.ones(rows, 32))
"""


@pytest.mark.parametrize(("how", "kept"), [("bounded", "create:cache_miss"), ("as it comes", "create:cache_hit")])
def test_a_kernel_of_long_ago_is_not_kept(how: str, kept: str):
    """The library itself tells whether it still has the first of 119 kernels."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("kernels need oneDNN, and this torch was built without it")
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}
    environment.pop(KERNEL_CACHE, None)
    command = [sys.executable, "-c", KERNELS_OF_MANY_SHAPES, how]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    created = [line for line in told if "create:cache" in line and ("inner_product" in line or "matmul" in line)]
    assert kept in created[-1]
