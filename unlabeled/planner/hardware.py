"""The devices of a plan: from the table of devices with an assumed utilization, or from a run that was measured."""

from dataclasses import dataclass
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.planner.options import PlanOptions
from unlabeled.planning.devices import find_device
from unlabeled.runtime.files import read_json


@dataclass(frozen=True)
class Hardware:
    """The devices of a plan, all of one kind.

    Attributes:
        device: The name of the device, or "cpu".
        precision: The precision of the matrix products, bf16 or fp32.
        flops_per_second: Speed of one device in training; None for "cpu", whose speed depends on the model.
        gigabytes: Memory of one device; None if it is not known.
        gigabytes_per_second: Bandwidth of this memory; None if it is not known.
        mfu: The model FLOPs utilization that was assumed; None if the speed was measured.
        peak_flops: FLOPs per second that `mfu` is a share of.
        measured: The folder of the run whose speed this is.
    """

    device: str
    precision: str
    flops_per_second: float | None = None
    gigabytes: float | None = None
    gigabytes_per_second: float | None = None
    mfu: float | None = None
    peak_flops: float | None = None
    measured: str | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether only the memory of a run on a CPU is asked for."""
        return self.device == "cpu"


def find_hardware(options: PlanOptions) -> Hardware | None:
    """Return the hardware that the options name, or None if they name none.

    Raises:
        UserError: The device is not known, has no unit for the precision, or `measured` is not a finished run.
    """
    if options.measured:
        return read_measured_hardware(options.measured)
    if not options.device:
        return None
    if options.device.lower() == "cpu":
        return Hardware("cpu", options.precision)
    device = find_device(options.device)
    peak = device.peak(options.precision)
    if peak is None:
        raise UserError(f"--device {device.name} has no unit for {options.precision}; set --precision fp32")
    return Hardware(
        device.name,
        options.precision,
        flops_per_second=options.mfu * peak,
        gigabytes=device.gigabytes,
        gigabytes_per_second=device.gigabytes_per_second,
        mfu=options.mfu,
        peak_flops=peak,
    )


def read_measured_hardware(folder: str) -> Hardware:
    """Read the device, precision and speed of a finished run from its folder."""
    try:
        metrics = read_json(Path(folder, "metrics.json"))
        run_plan = read_json(Path(folder, "lineage.json"))["plan"]
        speed = metrics["flops"] / metrics["train_seconds"] / run_plan["world_size"]
        device = run_plan["device"]
        precision = run_plan["precision"]
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"--measured {folder} is not the folder of a finished run ({error!r})") from error
    try:
        gigabytes = find_device(device).gigabytes
    except UserError:  # such as a CPU
        gigabytes = None
    return Hardware(device, precision, flops_per_second=speed, gigabytes=gigabytes, measured=folder)
