"""Peak rates by the names that drivers give devices."""

from __future__ import annotations

import pytest

from kosmos_lit.costs.peaks import Precision, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("h100 sxm", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 80GB HBM2e", "fp8", 1513),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "fp16", 835.5),
        ("NVIDIA GH200 480GB", "fp8", 1978.9),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", "fp32", 91.1),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
    ],
)
def test_a_device_is_found_by_its_drivers_name(name: str, precision: Precision, teraflops: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "Intel(R) Xeon(R) Platinum 8481C CPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "",
    ],
)
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None


@pytest.mark.parametrize(("name", "precision"), [("NVIDIA A100-SXM4-80GB", "fp8"), ("Tesla T4", "bf16")])
def test_a_dtype_that_a_device_does_not_support_has_no_peak(name: str, precision: Precision) -> None:
    assert peak_flops(name, precision) is None
