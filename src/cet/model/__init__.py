"""The module that users see: a backbone with exit heads, a policy, and the file they are saved to."""
