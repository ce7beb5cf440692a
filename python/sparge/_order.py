"""Orders of tokens that lie in a box of frames, rows and columns."""

from __future__ import annotations

from . import _sparge
from ._sparge import SpargeError

#: What an order is called here, and in `sparge::permute`.
ORDERS = {
    "row": "row-major",
    "column": "column-major",
    "time": "time-major",
    "hilbert": "hilbert",
    "random": "random",
}


def check_order(order: str) -> str:
    """The word of `sparge::permute` for an order; refuses what is none."""
    name, colon, seed = order.partition(":")
    is_seeded = name == "random" and seed.isdecimal()
    if name not in ORDERS or (colon and not is_seeded):
        raise SpargeError(
            f"order is {order!r}, expected one of {', '.join(ORDERS)}, or random:SEED"
        )
    return ORDERS[name] + colon + seed


def token_order(order: str, shape: "tuple[int, int, int]") -> memoryview:
    """The token that comes to each place when a box's tokens are put in ``order``.

    * ``order``: ``"row"`` (as they come: column fastest, then row, then frame), ``"column"`` (row
      fastest), ``"time"`` (frame fastest), ``"hilbert"`` (along a generalised Hilbert curve: each
      token is a direct neighbour of the one before, whatever the sizes), ``"random"`` or
      ``"random:SEED"``.
    * ``shape``: ``(frames, rows, columns)``, each at least 1; token (t, y, x) is the
      (t·rows + y)·columns + x-th.

    Returns int64 ``[frames·rows·columns]`` as a writable buffer, which ``torch.frombuffer(order,
    dtype=torch.int64)`` and ``numpy.asarray`` take as it is: ``x.index_select(dim, indices)`` orders
    x, ``indices.argsort()`` are the indices that undo it.

    Raises ``SpargeError`` for another order or shape.

    >>> sparge.token_order("hilbert", (1, 2, 2)).tolist()
    [0, 2, 3, 1]
    """
    word = check_order(order)
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise SpargeError(
            f"shape is {tuple(shape)}, expected (frames, rows, columns), integers of at least 1"
        )
    time, height, width = (int(n) for n in shape)
    return memoryview(_sparge.token_order(word, (time, height, width))).cast("q")
