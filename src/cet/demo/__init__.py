"""The demonstration behind `cet demo`: train, calibrate, evaluate, time, report."""
