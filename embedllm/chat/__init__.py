"""Chats: messages and tools to a prompt by the model's own template, and an answer to text, reasoning and calls.

Owns the checks on messages and tools, rendering, encoding, what tools let a model write, and parsing. Knows no engine.
Invariant: a control token in the result was written by the template; the same text in a message, a tool or an option is
encoded as plain text.
"""

from embedllm.chat.encode import Chat
from embedllm.chat.template import ChatTemplate, render

__all__ = ["Chat", "ChatTemplate", "render"]
