"""One step a size of group by the one-pass kernel, for a profiler that counts what is read: see ``gpu.sh``."""

from __future__ import annotations

import torch

from .cases import GPU_GROUPS
from .test_vaccinate import OPERATOR

if __name__ == "__main__":
    for case in GPU_GROUPS:
        print(f"{case}: {case.nbytes / 1e9:.2f} GB of gradients in groups of {case.P // case.K} columns", flush=True)
        buffers = case.empty(1, case.T, case.P)
        case.fill(buffers)
        OPERATOR.peers["cuda-one-pass"](case).run(buffers[0])
        torch.cuda.synchronize()
