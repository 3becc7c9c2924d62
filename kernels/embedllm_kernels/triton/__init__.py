"""Twins of the reference for CUDA, in Triton: one operation per file, the reference's signatures.

Imported only where a CUDA device computes. Knows torch and triton. Invariant: a kernel takes raw pointers and strides;
a block id is an int64 before it is multiplied; sums and statistics are float32 whatever the inputs are.
"""
