"""Quantizers of papers."""
