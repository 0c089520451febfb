"""Prints the tables of docs/scale.md: what ring and Ulysses cost by their model. python -m bench.scale"""

from __future__ import annotations

HEADS, HEADS_KV, SIZE, BYTES = 32, 8, 128, 2
FLOPS = 600e12  # of the forward of one GPU, a second
MEMORY = 2.5e12  # bytes read and written a second
LINKS = {"NVLink 4, one host": 370e9, "InfiniBand NDR, one port a GPU": 45e9, "Ethernet, 100 Gb/s a GPU": 11e9}
ONE_HOST = 8  # GPUs
POINTS = (
    (1 << 16, 2), (1 << 17, 2), (1 << 17, 8), (1 << 20, 32), (1 << 20, 128), (10 << 20, 128), (10 << 20, 1024),
    (1 << 20, 1024),
)  # fmt: skip


def ring(tokens: int, ranks: int, link: float) -> tuple[float, float]:
    """Returns the efficiency of a step of a causal forward, without and with the merge of its out."""
    each = tokens / ranks
    compute = 2 * each**2 * HEADS * SIZE / FLOPS
    message = 2 * each * HEADS_KV * SIZE * BYTES / link
    merge = 14 * each * HEADS * SIZE / MEMORY
    return compute / max(compute, message), compute / max(compute + merge, message)


def ulysses(tokens: int, ranks: int, link: float) -> float | None:
    """Returns the efficiency of a causal forward; None where there are more ranks than heads."""
    if ranks > HEADS:
        return None
    compute = 2 * tokens**2 * HEADS * SIZE / ranks / FLOPS
    of_heads = 2 * HEADS + 2 * max(HEADS_KV, ranks)
    exchange = of_heads * (tokens / ranks) * SIZE * BYTES * (ranks - 1) / ranks / link
    return compute / (compute + exchange)


def main() -> None:
    print("| link | W, GB/s a GPU and direction | ring hides from T / R = | Ulysses exposes 5 % from T = |")
    print("| --- | --- | --- | --- |")
    for name, link in LINKS.items():
        shortest = HEADS_KV / HEADS * BYTES * FLOPS / link
        longest = (1 + HEADS_KV / HEADS) * BYTES * FLOPS / link * 0.95 / 0.05
        print(f"| {name} | {link / 1e9:.0f} | {shortest:,.0f} | {longest:,.0f} |")
    print("\n| T | R | T / R | ring | ring with merges | Ulysses |\n| --- | --- | --- | --- | --- | --- |")
    within, between = list(LINKS.values())[:2]
    for tokens, ranks in POINTS:
        link = within if ranks <= ONE_HOST else between
        alone, merged = ring(tokens, ranks, link)
        by_heads = ulysses(tokens, ranks, link)
        last = "R > H" if by_heads is None else f"{by_heads:.2f}"
        print(f"| {tokens:,} | {ranks:,} | {tokens // ranks:,} | {alone:.2f} | {merged:.2f} | {last} |")


if __name__ == "__main__":
    main()
