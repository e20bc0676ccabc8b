"""Evaluation: metrics, baselines and tables."""
