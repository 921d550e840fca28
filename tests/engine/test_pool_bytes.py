"""Records of pools by their addresses."""

import pytest
import torch

from engine.pool_bytes import PoolBytes


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
