"""Tiers of hardware that one may not own. `calibrate` measures the one at hand.

Each bandwidth is what arrives at an accelerator, in the narrowest place on the way. Four of the source documents' are
replaced: HBM 800 GB/s by the data sheets'; CPU 150 GB/s, which no PCIe 4.0 link carries; SSD 10 GB/s, more than the
link of a PCIe 4.0 drive; CXL 400 GB/s, twelve times that of an expander of 8 lanes. Setup times are the documents',
but those of the fabric and of persistent memory.
"""

from __future__ import annotations

from infold.tiers.spec import TierSpec

PRESETS: dict[str, TierSpec] = {
    # NVIDIA's data sheets (SXM modules): peak, of which a copy reaches about 90%.
    "A100": TierSpec("HBM", 1, 2039, 80_000_000_000, resident=True),
    "H100": TierSpec("HBM", 1, 3350, 80_000_000_000, resident=True),
    "H200": TierSpec("HBM", 1, 4800, 141_000_000_000, resident=True),
    # Pinned copies over 16 lanes of PCIe 4.0 take 25-28 GB/s of the 31.5 on the wire; of PCIe 5.0 about 55 of 63.
    "PCIe4": TierSpec("CPU", 5, 26),
    "PCIe5": TierSpec("CPU", 5, 55),
    # A PCIe 4.0 drive's rated sequential read; 4 lanes carry 7.88 GB/s.
    "NVMe4": TierSpec("SSD", 30, 7, on_disk=True),
    # A memory expander on 8 lanes of PCIe 5.0, the usual width: 31.5 GB/s on the wire.
    "CXL": TierSpec("CXL", 2, 31.5),
    # Remote memory over one port of 200 Gb/s; the setup is a round trip of RDMA, some 3 us.
    "fabric": TierSpec("fabric", 3, 25),
    # Six interleaved Optane modules read 39.4 GB/s (Izraelevitz et al. 2019, arXiv:1903.05714): PCIe 4.0 is narrower.
    "persistent": TierSpec("persistent", 1, 26),
}
