"""Training of the model in the box: data, tokenizer, model, optimiser, evaluation and export, each one file.

Run as `python -m embedllm.demo.train --help`. Needs torch, tokenizers and safetensors, and nothing of the engine.
"""
