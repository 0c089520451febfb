"""A record as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attn_n.inspect.attention import Heads
from attn_n.inspect.moments import Distribution


def table(attention: Mapping[str, Heads], activations: Mapping[str, Distribution]) -> str:
    """Return a table of all heads, and one of all activations."""
    heads = [
        (name, head, f"{heads.rows[head]:,}", f"{heads.to_nothing[head]:.2%}", f"{heads.entropy[head]:.3f}",
         f"{heads.first_token[head]:.2%}")
        for name, heads in attention.items() for head in range(len(heads.rows))
    ]  # fmt: skip
    values = [
        (name, f"{x.count:,}", f"{x.mean:.3g}", f"{x.variance:.3g}", f"{x.skewness:.2f}", f"{x.kurtosis:.2f}",
         f"{x.infinity_norm:.3g}", f"{x.beyond_6_sigma:,}")
        for name, x in activations.items()
    ]  # fmt: skip
    of_heads = ["attention", "head", "rows", "to nothing", "entropy", "first token"]
    of_values = ["activations", "values", "mean", "variance", "skewness", "kurtosis", "max |x|", "beyond 6 sigma"]
    return "\n\n".join(
        _aligned(titles, rows) if rows else f"No {titles[0]} recorded."
        for titles, rows in ((of_heads, heads), (of_values, values))
    )


def _aligned(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return lines of columns: the first one begins at the left, the others end at the right."""
    cells = [list(titles), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
