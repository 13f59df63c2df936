"""matplotlib's figures, whatever backend MPLBACKEND names: pictures go to files and arrays, and need none.

Where a notebook's kernel left the name of a backend that is not installed here, matplotlib refuses it when it is first imported.
It is therefore imported without that variable, and given the backend afterwards, where it knows it. Whoever draws imports
this module before any of matplotlib's.
"""

import contextlib
import os
import sys

_chosen = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
finally:
    if _chosen is not None:
        os.environ["MPLBACKEND"] = _chosen
if _chosen:
    with contextlib.suppress(ValueError):  # matplotlib does not know it
        matplotlib.rcParams["backend"] = _chosen

__all__ = ["Figure", "FigureCanvasAgg"]
