"""How it is measured: the correctness check, the clocks, rounds in turns, what is compiled before."""
