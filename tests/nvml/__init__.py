"""A simulated NVML whose GPUs draw a known power."""
