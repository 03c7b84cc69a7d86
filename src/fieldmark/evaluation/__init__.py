"""Measuring a Predict on labelled images, and keeping what was measured."""
