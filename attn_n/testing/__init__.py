"""Checks of attention functions with sinks, whoever wrote them."""

from attn_n.testing.check import Finding, Report, check_attention

__all__ = ["Finding", "Report", "check_attention"]
