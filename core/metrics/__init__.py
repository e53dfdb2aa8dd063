"""Metrics of tasks: pure functions of an expected and a given reply, and confidence intervals. See docs/evaluation.md."""
