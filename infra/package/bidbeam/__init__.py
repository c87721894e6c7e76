"""Bidbeam: batch inference that buys its tokens, as an Apache Beam pipeline."""

__version__ = "0.1.0"
