"""Chat messages to a prompt: the model's own template, sandboxed, and token ids that contents cannot forge.

Owns the checks on messages, rendering and encoding. Knows nothing of generation. Invariant: a control token in the
result was written by the template; the same text in a message, a tool or an option is encoded as plain text.
"""

from embedllm.chat.encode import Chat
from embedllm.chat.template import ChatTemplate, render

__all__ = ["Chat", "ChatTemplate", "render"]
