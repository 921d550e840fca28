"""Records of pools by their addresses."""

import ctypes

import pytest
import torch

from engine.gpu_direct import flush_of
from engine.pool_bytes import PoolBytes
from runtime.errors import EngineError


@pytest.fixture
def pools():
    """On a GPU where there is one."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in ((4, 33), (3, 20)))
    return [pool.to("cuda" if torch.cuda.is_available() else "cpu") for pool in made]


def test_every_record_is_found_in_its_pool(pools):
    read = PoolBytes(*pools).read
    for pool in pools:
        for index, record in enumerate(pool):
            assert bytes(read(pool.data_ptr() + index * pool.shape[1], pool.shape[1])) == bytes(record.cpu().numpy())


def test_what_lies_outside_is_refused(pools):
    read = PoolBytes(*pools).read
    first = pools[0].data_ptr()
    for address, count in ((first - 1, 2), (first + 33 * 4 - 1, 2), (0, 1)):
        with pytest.raises(ValueError, match="in none of 2 pools"):
            read(address, count)


class Driver:
    """Answers as the CUDA driver of a device with these attributes."""

    def __init__(self, ordering: int, options: int, error: int = 0) -> None:
        self._attributes = {118: ordering, 117: options}
        self._error = error
        self.flushes: list[tuple[int, int]] = []

    def cuDeviceGetAttribute(self, value: object, attribute: int, index: int) -> int:
        assert index == 3
        value._obj.value = self._attributes[attribute]  # type: ignore[attr-defined]
        return 0

    def cuFlushGPUDirectRDMAWrites(self, target: int, scope: int) -> int:
        self.flushes.append((target, scope))
        return self._error


@pytest.mark.parametrize(
    ("ordering", "options", "flushed"), [(0, 1, True), (0, 3, True), (100, 1, False), (200, 3, False), (0, 2, False)]
)
def test_writes_of_network_devices_are_flushed_where_the_device_does_not_order_them(ordering, options, flushed, caplog):
    driver = Driver(ordering, options)
    flush = flush_of(torch.device("cuda", 3), driver)
    assert (flush is not None) == flushed
    assert ("use no RDMA" in caplog.text) == ((ordering, options) == (0, 2))
    if flush is not None:
        flush()
        assert driver.flushes == [(0, 100)]


def test_a_flush_that_fails_is_an_error():
    flush = flush_of(torch.device("cuda", 3), Driver(0, 1, error=719))
    with pytest.raises(EngineError, match="719"):
        flush()


@pytest.mark.gpu
def test_the_driver_of_a_real_device_answers_and_settling_waits_for_the_default_stream():
    device = torch.device("cuda", 0)
    memory = PoolBytes(torch.zeros(1, 1 << 20, dtype=torch.uint8, device=device))
    memory.bind_thread()
    flush_of(device)
    driver, options = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(-1)
    assert driver.cuDeviceGetAttribute(ctypes.byref(options), 117, 0) == 0
    assert (driver.cuFlushGPUDirectRDMAWrites(0, 100) == 0) == bool(options.value & 1)
    with torch.cuda.stream(torch.cuda.default_stream()):
        torch.cuda._sleep(1 << 28)
    assert not torch.cuda.default_stream().query()
    memory.settle()
    assert torch.cuda.default_stream().query()


@pytest.mark.gpu(2)
def test_settling_waits_for_copies_that_another_gpus_default_stream_makes():
    memory = PoolBytes(torch.zeros(1, 64, dtype=torch.uint8, device="cuda:1"))
    first = torch.cuda.default_stream(torch.device("cuda", 0))
    with torch.cuda.stream(first):
        torch.cuda._sleep(1 << 28)
    assert not first.query()
    memory.settle()
    assert first.query()
