"""What cards measured, for the planner: ``python -m tools.cards`` writes it from ``benchmarks/results/cards``.

No card has been measured yet: these are estimates.
"""

NUM_CARDS = 0
CUDA_CONTEXT = 471859200  # bytes: the context and the kernels loaded into it
CUDA_WORKSPACES = 157286400  # bytes: of cuBLAS (32 MiB), cuDNN, and the backward pass of deterministic attention
FRAGMENTATION = 0.05  # of the peak: gaps in the blocks of the caching allocator, with expandable segments
SHARE_OF_BANDWIDTH = 0.75  # of the public figure
SHARE_OF_PCIE = 0.8  # of the public figure
RATIOS: dict[str, dict[str, float]] = {}  # by card and field: seconds of a step with a technique over those without
SECONDS: dict[str, float] = {}  # by card: measured seconds of a step over predicted ones
