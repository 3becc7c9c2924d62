"""Faster twins of the reference for processors, still plain torch: one operation per file.

Knows nothing above torch. Invariant: each twin takes what its reference takes, or a form of it prepared once per step
or once per model by the functions here, and gives the same result within rounding.
"""
