"""The command line: `llama4-kernels demo | doctor`."""
