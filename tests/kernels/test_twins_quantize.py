"""The quantisers' twins: exact scales, ties, idempotence, packed round trips."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.hadamard import hadamard_matrix, hadamard_ref
from kernels.packed_rows import PackedRows, copy_rows, read_rows_ref, simulate_row_ref, store_rows, write_rows_ref
from kernels.quantize import (
    decode_e4m3,
    decode_e8m0,
    decode_fp4,
    dequantize_fp8_tiles,
    quantize_fp4,
    quantize_fp8,
    quantize_fp8_tiles,
    scale_bytes_of,
    simulate_fp4_ref,
    simulate_fp8_ref,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_e8m0_byte_decodes_to_its_power_of_two() -> None:
    values = decode_e8m0(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert math.isnan(values[255])


def test_every_e4m3_byte_decodes_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(decode_e4m3(codes).nan_to_num(-1), codes.view(torch.float8_e4m3fn).float().nan_to_num(-1))


def test_fp4_codes_decode_low_nibble_first() -> None:
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert decode_fp4(packed).tolist() == [magnitudes + [-value for value in magnitudes]]


@pytest.mark.parametrize("exponent", [-20, -3, 0, 1, 7, 30])
def test_a_scale_is_exact_at_powers_of_two_and_the_next_one_just_above(exponent: int) -> None:
    power = torch.tensor([2.0**exponent])
    above = torch.nextafter(power, torch.tensor([math.inf]))
    below = torch.nextafter(power, torch.tensor([0.0]))
    found = [int(scale_bytes_of(value, 1.0)) - 127 for value in (below, power, above)]
    assert found == [exponent, exponent, exponent + 1]


def test_fp4_rounds_ties_to_the_even_code() -> None:
    block = torch.zeros(1, 32)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    block[0, :7] = torch.tensor(ties)
    block[0, 7:14] = -torch.tensor(ties)
    block[0, 14] = 6.0
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert simulate_fp4_ref(block, 32)[0, :15].tolist() == [*wanted, *(-value for value in wanted), 6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 128), (1, 64), (63, 448), (5, 3, 256), (2, 200)])
def test_simulation_is_idempotent_and_close(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (randn(*shape) * randn(*shape[:-1], 1, seed=1).exp()).to(dtype)
    once = simulate_fp8_ref(x, 64)
    assert once.dtype == dtype
    assert torch.equal(simulate_fp8_ref(once, 64), once)
    if x.numel():
        assert ((once.float() - x.float()).abs() <= 2.0**-4 * x.float().abs() + 2.0**-9 * x.float().abs().max()).all()


@pytest.mark.parametrize("width", [32, 128])
def test_fp4_simulation_is_idempotent(width: int) -> None:
    x = randn(50, width) * 100
    once = simulate_fp4_ref(x, 32)
    assert torch.equal(simulate_fp4_ref(once, 32), once)
    assert ((once - x).abs() <= x.abs().unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1) / 3).all()


def test_simulated_values_are_exact_in_bfloat16() -> None:
    x = randn(64, 448)
    for simulated in (simulate_fp8_ref(x, 64), simulate_fp4_ref(x, 32)):
        assert torch.equal(simulated.bfloat16().float(), simulated)


def test_zeros_and_tiny_values_keep_the_floor_of_the_scale() -> None:
    codes, scales = quantize_fp8(torch.full((1, 64), 1e-30), 64)
    assert int(scales) - 127 == math.ceil(math.log2(1e-4 / 448))
    assert not codes.any()
    packed, scales = quantize_fp4(torch.zeros(1, 32), 32)
    assert int(scales) == 1
    assert not packed.any()


def test_the_largest_value_of_a_block_is_not_clipped() -> None:
    for value in (448.0, 449.0, 1e-3, 3e38):
        x = torch.full((1, 64), value)
        assert abs(simulate_fp8_ref(x, 64)[0, 0].item() / value - 1) <= 1 / 16


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (24, 300)])
def test_tiles_at_the_edge_have_scales_of_their_own(shape: tuple[int, int]) -> None:
    weight = randn(*shape)
    weight[-1, -1] = 1000.0
    codes, scales = quantize_fp8_tiles(weight, 128)
    assert codes.shape == shape
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = dequantize_fp8_tiles(codes, scales, 128)
    assert torch.equal(dequantize_fp8_tiles(*quantize_fp8_tiles(back, 128), 128), back)
    assert ((back - weight).abs() <= 2.0**-4 * weight.abs() + 2.0**-9 * weight.abs().max()).all()


def test_hadamard_is_orthonormal_and_its_own_inverse() -> None:
    for dim in (1, 2, 64, 128):
        matrix = hadamard_matrix(dim, torch.device("cpu"))
        assert (matrix @ matrix - torch.eye(dim)).abs().max() < 1e-6
        signs = [[(-1) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
        assert torch.allclose(matrix * dim**0.5, torch.tensor(signs, dtype=torch.float32))
    x = randn(3, 5, 128)
    assert (hadamard_ref(hadamard_ref(x)) - x).abs().max() < 1e-5
    with pytest.raises(ValueError, match="96"):
        hadamard_matrix(96, torch.device("cpu"))


def pool(format: str, pages: int = 3, rows: int = 5) -> PackedRows:
    """A poisoned pool inside larger strides, as a layer sees its part of a page."""
    wide = {"width": 192, "rope_dim": 64} if format.startswith(("kv", "bf16", "f32")) else {"width": 128, "rope_dim": 0}
    raw = torch.full((pages, 8192), 0xFF, dtype=torch.uint8)
    record = {"kv_fp8": 256, "bf16": 384, "f32": 768, "key_mxfp4": 64, "key_fp8": 128}[format]
    data = raw[:, 128 : 128 + rows * record]
    scales = None
    if format == "kv_fp8":
        scales = raw[:, 4096 : 4096 + rows * 8].unflatten(1, (rows, 8))
    elif format == "key_mxfp4":
        scales = raw[:, 4096 : 4096 + rows * 4].unflatten(1, (rows, 4))
    elif format == "key_fp8":
        scales = raw[:, 4096 : 4096 + rows * 4].view(torch.float32).unflatten(1, (rows, 1))
    plain = {"bf16": torch.bfloat16, "f32": torch.float32}.get(format, torch.uint8)
    return PackedRows(format=format, data=data.view(plain).unflatten(1, (rows, -1)), scales=scales, **wide)


FORMATS = ["f32", "bf16", "kv_fp8", "key_mxfp4", "key_fp8"]
PAGE, ROW = torch.tensor([2, 0, 0, 1]), torch.tensor([4, 0, 3, 1])


@pytest.mark.parametrize("format", FORMATS)
def test_simulated_rows_survive_packing_bit_for_bit(format: str) -> None:
    rows = pool(format)
    values = simulate_row_ref(rows, randn(4, rows.width).bfloat16())
    write_rows_ref(rows, PAGE, ROW, values)
    assert torch.equal(read_rows_ref(rows, PAGE, ROW, torch.bfloat16), values)
    assert torch.equal(read_rows_ref(rows, PAGE.int(), ROW.int(), torch.float32), values.float())


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_is_quantised_once_however_it_is_stored(format: str) -> None:
    once, twice = pool(format), pool(format)
    values = randn(4, once.width).bfloat16()
    write_rows_ref(once, PAGE, ROW, values if once.scales is not None else simulate_row_ref(once, values))
    write_rows_ref(twice, PAGE, ROW, simulate_row_ref(twice, values))
    back = [read_rows_ref(rows, PAGE, ROW, torch.float32) for rows in (once, twice)]
    assert torch.equal(*back)


@pytest.mark.parametrize("format", FORMATS)
def test_writes_touch_only_their_rows(format: str) -> None:
    rows = pool(format)
    before = rows.data.clone()
    write_rows_ref(rows, PAGE, ROW, randn(4, rows.width))
    differs = (rows.data.view(torch.uint8) != before.view(torch.uint8)).any(-1)
    changed = {(page, row) for page, row in differs.nonzero().tolist()}
    assert changed == set(zip(PAGE.tolist(), ROW.tolist(), strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_copies_are_byte_for_byte_and_no_rows_are_no_work(format: str) -> None:
    source, target = pool(format), pool(format)
    write_rows_ref(source, PAGE, ROW, randn(4, source.width))
    copy_rows(source, PAGE, ROW, target, ROW.clamp(max=2), PAGE)
    for read in (lambda rows, a, b: read_rows_ref(rows, a, b, torch.float32),):
        assert torch.equal(read(source, PAGE, ROW), read(target, ROW.clamp(max=2), PAGE))
    none = torch.zeros(0, dtype=torch.int64)
    store_rows(target, none, none, torch.zeros(0, target.width), simulate=True)
    assert read_rows_ref(target, none, none, torch.float32).shape == (0, target.width)


def test_the_packed_kv_row_is_the_published_one() -> None:
    """448 e4m3 bytes, 64 bf16 values, 7 scale bytes and a zero."""
    rows = PackedRows(
        format="kv_fp8", width=512, rope_dim=64,
        data=torch.full((1, 1, 576), 0xFF, dtype=torch.uint8), scales=torch.full((1, 1, 8), 0xFF, dtype=torch.uint8),
    )  # fmt: skip
    values = torch.zeros(1, 512)
    values[0, 64:128] = 448.0
    values[0, 128] = -1.75 * 8
    values[0, 448] = 1.0
    write_rows_ref(rows, torch.tensor([0]), torch.tensor([0]), values)
    data, scales = rows.data[0, 0], rows.scales[0, 0]
    floor = 127 + math.ceil(math.log2(1e-4 / 448))
    assert scales.tolist() == [floor, 127, 127 + math.ceil(math.log2(14 / 448)), *[floor] * 4, 0]
    assert data[64:128].unique().tolist() == [0x7E]
    assert decode_e4m3(data[128:129]).item() * 2.0 ** (int(scales[2]) - 127) == -14.0
    assert data[576 - 128 : 576 - 126].tolist() == [0x80, 0x3F]


def test_index_keys_are_rotated_before_they_are_quantised() -> None:
    rows = pool("key_mxfp4")
    outlier = torch.zeros(4, 128)
    outlier[:, 5] = 64.0
    store_rows(rows, PAGE, ROW, outlier, simulate=True)
    spread = read_rows_ref(rows, PAGE, ROW, torch.float32)
    assert torch.equal(spread.abs(), torch.full((4, 128), 6.0))
    store_rows(rows, PAGE, ROW, outlier, simulate=False)
    assert read_rows_ref(rows, PAGE, ROW, torch.float32)[:, 5].tolist() == [64.0] * 4
