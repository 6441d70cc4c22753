"""Assumptions of a plan about hardware: data sheets, and the fractions that training reaches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from calm_dist.costs import flops
from calm_dist.errors import UserError


@dataclass(frozen=True)
class Rates:
    """Speed of this package's kernels; every number can be replaced on the command line.

    The fractions are assumptions, not measurements: this package has not been timed on GPUs yet.
    """

    matmul_fraction: float = 0.70
    """Fraction of peak FLOP/s in matrix products of a layer's shape. Products of 8,192 x 8,192
    reach 0.75 to 0.8 on these chips, within their power limit; a layer's are smaller."""
    attention_fraction: float = 0.40
    """Fraction of peak FLOP/s in causal attention, forward and backward: what FlashAttention-2
    reaches on an H100 with heads of 128 (its paper: 0.73 on an A100; arXiv 2307.08691)."""
    bandwidth_fraction: float = 0.80
    """Fraction of memory bandwidth in element-wise kernels on large tensors."""
    link_fraction: float = 0.80
    """Fraction of a link's bandwidth in collectives of large messages."""
    issue_fraction: float = 0.60
    """Fraction of the clocks in which a multiprocessor's four schedulers issue an instruction, in
    kernels that neither matrix products nor memory limit."""
    dispatch_seconds: float = 9e-6
    """Time of the host for one kernel launch, with what PyTorch, Megatron-core and this package do
    in between."""
    wait_seconds: float = 3e-5
    """Time for which a device does nothing when the host reads a result and then launches again: a
    copy of some bytes, the host's wake-up, a launch (assumption)."""
    draws_per_second: float = float("inf")
    """Normal numbers a second; infinite: limited only by writing them."""
    synchronous: bool = False
    """Whether launching adds to a kernel's time (CPUs) or overlaps with it (GPUs)."""


@dataclass(frozen=True)
class Cluster:
    """One kind of GPU and its connections. Bandwidths are in bytes/s per GPU, in one direction."""

    name: str
    peak_flops: float
    """FLOP/s of dense products in bf16."""
    fp32_flops: float
    """The same in fp32 without TF32, which torch does not use by default."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    node_bandwidth: float
    """Bandwidth between GPUs of a node."""
    network_bandwidth: float
    """Bandwidth between nodes."""
    node_latency: float = 4e-6
    """Seconds of one step of a collective inside a node, launch included (assumption)."""
    network_latency: float = 12e-6
    """The same between nodes (assumption)."""
    gpus_per_node: int = 8
    reserved: float = 3e9
    """Bytes used by driver, cuBLAS workspaces and NCCL's buffers (assumption)."""
    on_cpu: bool = False
    price: float | None = None
    """Price of a GPU-hour; prices differ too much between sites for a default."""
    rates: Rates = Rates()

    @property
    def instructions_per_second(self) -> float:
        """Warp instructions: one is 32 multiply-adds of the fp32 peak."""
        return self.fp32_flops / 64 * self.rates.issue_fraction

    @property
    def usable_memory(self) -> float:
        return self.memory - self.reserved

    def with_rates(self, **values: Any) -> Cluster:
        """The cluster with other `Rates`."""
        return replace(self, rates=replace(self.rates, **values))


def _gpu(
    name: str, chip: str, memory: float, bandwidth: float, node: float, network: float
) -> Cluster:
    """A preset with the peak FLOP/s to which MFU refers."""
    peaks = [flops.peak_flops(chip, precision) for precision in ("bf16", "fp32")]
    assert peaks[0] is not None and peaks[1] is not None
    return Cluster(name, peaks[0], peaks[1], memory, bandwidth, node, network)


# Networks are those of NVIDIA's DGX machines: one network card per GPU. The data sheets give NVLink
# as the sum of both directions.
PRESETS = {
    cluster.name: cluster
    for cluster in (
        # A100 80GB SXM data sheet: 2,039 GB/s, NVLink 600 GB/s. DGX A100: 8 cards of 200 Gb/s.
        _gpu("a100-sxm-80", "A100", 80e9, 2.039e12, 300e9, 25e9),
        # H100 SXM data sheet: 3.35 TB/s, NVLink 900 GB/s. DGX H100: 8 cards of 400 Gb/s.
        _gpu("h100-sxm", "H100", 80e9, 3.35e12, 450e9, 50e9),
        # H200 SXM data sheet: 141 GB, 4.8 TB/s. DGX H200: 8 cards of 400 Gb/s.
        _gpu("h200-sxm", "H200", 141e9, 4.8e12, 450e9, 50e9),
        # DGX B200 data sheet: 8 GPUs with 1,440 GB and 64 TB/s; NVLink 5 1.8 TB/s; 8 cards of
        # 400 Gb/s.
        _gpu("b200", "B200", 180e9, 8e12, 900e9, 50e9),
    )
}


def preset(name: str) -> Cluster:
    """The cluster of that name.

    Raises:
        UserError: there is none.
    """
    try:
        return PRESETS[name]
    except KeyError:
        known = ", ".join(PRESETS)
        raise UserError(f"--gpu {name}: unknown; use one of {known}, or local") from None
