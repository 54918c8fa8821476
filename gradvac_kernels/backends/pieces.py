"""Where the GPU backends cut the groups.

It depends on a group's own columns and the number of rows only, never on the device or on the other groups: so do the
bits.
"""

from __future__ import annotations

RUN = 4096  # columns whose products are added up in float32; float64 adds up the runs


def piece_columns(columns: int, num_rows: int) -> int:
    """Columns of each piece of a group, 0 for none: short ones where there is little to share out, long ones where
    there is much, and never more pieces than are quickly added up.

    What a piece costs beside its columns is some microseconds: of a piece of RUN, a tenth. It leaves T x T sums behind:
    with many rows it is made longer, so that they stay few beside what was read.
    """
    if columns <= RUN:
        return 0
    if num_rows <= 16:
        long = (8 if num_rows <= 8 else 4) * RUN
        unit, most = (RUN // 4 if columns <= 64 * RUN else RUN if columns <= 1024 * RUN else long), 2048
    else:
        unit, most = 2 * RUN * -(-num_rows // 512), 1024
    return unit * -(-columns // (unit * most))


def cut(begin: int, end: int, length: int) -> list[tuple[int, int]]:
    """First column and one past the last of each piece; none of length 0."""
    if length == 0:
        return []
    return [(start, min(start + length, end)) for start in range(begin, end, length)]
