"""What a run of `cet demo` or `cet calibrate` reports: quality, compute, time and joules, as JSON, text and plots."""
