"""The workloads that are measured, one by one and in suites."""

from bench.workloads.workload import FORWARD, PASSES, Inputs, Workload, make_inputs

__all__ = ["FORWARD", "PASSES", "Inputs", "Workload", "make_inputs"]
