"""`embedllm bench`: fixed work, measured on embedllm and, if asked, on other engines beside it.

Uses only the public names of embedllm. `workloads` says what is asked, `engines` and `peers` who answers, `report` what
is printed, `overhead` and `waste` measure the engine alone; `gpu` and the modules named after it measure a CUDA card.
Invariant: everybody gets the same token ids and must return the same number of tokens.
"""
