"""How many threads work for one Python thread."""

import torch

from icrl_kernels import _C, _checks


def set_threads_here(threads: int) -> None:
    """Set how many threads torch's operators and these kernels use when called from this Python thread.

    Other threads keep theirs, unlike with torch.set_num_threads, which also sets MKL's for the whole process.
    """
    threads = _checks.integer("threads", threads, 1, _checks.MOST_THREADS)
    torch.get_num_threads()  # torch sets a new thread's number at its first use: let it, then overrule
    _C.set_team_size(threads)
