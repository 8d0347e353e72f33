"""Measuring: how long something takes, and on what machine."""
