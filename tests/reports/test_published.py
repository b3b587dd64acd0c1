"""The published table as data: eight rows, and their figures as the table shows them."""

from reports.published import BIOMISTRAL_7B
from reports.table import Column


def test_the_eight_rows_as_published() -> None:
    shown = [
        (row.base_model, row.method, row.q_group_size, row.w_bit, row.version, row.vram_gb, row.time)
        for row in BIOMISTRAL_7B
    ]
    assert shown == [
        ("BioMistral-7B", "FP16/BF16", None, None, None, 15.02, 1.00),
        ("BioMistral-7B", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
        ("BioMistral-7B", "AWQ", 128, 4, "GEMV", 4.68, 10.30),
        ("BioMistral-7B", "BnB.4", None, 4, None, 5.03, 3.25),
        ("BioMistral-7B", "BnB.8", None, 8, None, 8.04, 4.34),
        ("BioMistral-7B-DARE", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
        ("BioMistral-7B-TIES", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
        ("BioMistral-7B-SLERP", "AWQ", 128, 4, "GEMM", 4.68, 1.41),
    ]


def test_our_formats_show_the_published_figures_as_published() -> None:
    times = [Column("Time", "ratio").text(row.time) for row in BIOMISTRAL_7B]
    assert times == ["x1.00", "x1.41", "x10.30", "x3.25", "x4.34", "x1.41", "x1.41", "x1.41"]
    memory = [Column("VRAM GB", "gigabytes").text(row.vram_gb * 1e9) for row in BIOMISTRAL_7B]
    assert memory == ["15.02", "4.68", "4.68", "5.03", "8.04", "4.68", "4.68", "4.68"]
