"""What devices can do."""

import re

# Dense peaks in TFLOPS with fp32 accumulation, from NVIDIA's data sheets and architecture white papers, whose figures
# "with sparsity" are halved. Names are those of `torch.cuda.get_device_name`, and match from end to end: a laptop, Ti,
# NVL or MIG variant of the same name has another peak.
_COLUMN = {"bf16": 0, "fp16": 1, "tf32": 2, "fp32": 3}
_PEAKS = {
    r"H200|H100 80GB HBM3": (989.4, 989.4, 494.7, 66.9),
    r"H100 PCIe": (756.0, 756.0, 378.0, 51.0),
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": (312.0, 312.0, 156.0, 19.5),
    r"L40S": (362.0, 362.0, 183.0, 91.6),
    r"L4": (121.0, 121.0, 60.0, 30.3),
    r"A10": (125.0, 125.0, 62.5, 31.2),
    r"GeForce RTX 4090": (165.2, 165.2, 82.6, 82.6),
    r"GeForce RTX 3090": (71.0, 71.0, 35.6, 35.6),
    r"V100-SXM2-\d+GB": (None, 125.0, None, 15.7),
    r"V100-PCIE-\d+GB": (None, 112.0, None, 14.0),
    r"T4": (None, 65.0, None, 8.1),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak, in FLOPs per second, of a GPU as `torch.cuda.get_device_name` names it; None where it is not known.

    `precision` is that of the matrix products: bf16, fp16, tf32, or fp32 without tensor cores (else `KeyError`). None
    also where the device has no unit for it (bf16 and tf32 on V100 and T4).
    """
    column = _COLUMN[precision]
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    tera = next((peaks[column] for pattern, peaks in _PEAKS.items() if re.fullmatch(pattern, name)), None)
    return None if tera is None else tera * 1e12
