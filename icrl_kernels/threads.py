"""How many threads work for one Python thread."""

import torch

from icrl_kernels import _C


def set_threads_here(threads: int) -> None:
    """Set how many threads torch's operators and these kernels use when called from this Python thread.

    Other threads keep theirs, unlike with torch.set_num_threads, which also sets MKL's for the whole process.
    """
    if threads < 1:
        raise ValueError(f"threads: wanted at least 1, got {threads}")
    torch.get_num_threads()  # torch sets a new thread's number at its first use: let it, then overrule
    _C.set_team_size(threads)
