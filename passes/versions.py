"""What differs between versions of PyTorch and no name tells."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion

IS_BEFORE_2_13 = TorchVersion(torch.__version__) < "2.13"
