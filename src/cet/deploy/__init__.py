"""Models with exits as files, for runtimes that know nothing of cet."""
