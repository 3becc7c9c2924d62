"""Models: what a folder of weights is, and how it becomes something a step can run.

`config` reads config.json, `hub` finds the folder, `loader` streams the weights, `decoder` is the native model and
`fallback` runs any other causal model of transformers. Nothing here knows of requests, sequences or scheduling.
Invariant: importing this package imports nothing else.
"""
