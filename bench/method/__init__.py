"""The method: correctness check, clocks, interleaved rounds, precompilation."""
