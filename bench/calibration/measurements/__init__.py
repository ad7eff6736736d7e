"""Every measurement of the chip, in the order in which they run: what the floors rest on comes first."""

from bench.calibration.measurement import Measurement
from bench.calibration.measurements import bandwidth, cluster, fp8, l2, launch, layouts, matmul, weight_stream, wgmma

MODULES = (bandwidth, matmul, weight_stream, wgmma, launch, cluster, l2, layouts, fp8)
MEASUREMENTS: tuple[Measurement, ...] = tuple(measurement for module in MODULES for measurement in module.MEASUREMENTS)
