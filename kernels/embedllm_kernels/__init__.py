"""Every operation of a decoder step, once as a specification and once per kind of hardware.

`reference` is plain torch: the specification, the oracle of every test and the portable back-end. `cpu` holds faster
twins for processors. Knows nothing of models, batches or requests, and imports torch only. Invariant: a twin computes
what its reference computes, within the tolerance that its test states.
"""
