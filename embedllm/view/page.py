"""A recording as one HTML file that shows itself, from any disk and without a network.

Owns the file's form. Knows messages, not what they mean. Invariant: its policy forbids every request, and everything
that comes from a recording stands in it as data, never as markup or script.
"""

from __future__ import annotations

import base64
import html
import json
import struct
import zlib
from collections.abc import Iterable, Mapping

from embedllm.view import module

POLICY = "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; padding: 16px; font: 14px system-ui, sans-serif; background: Canvas; color: CanvasText; }
main { max-width: 1280px; margin: 0 auto; }
"""
BOOT = """
const text = (id) => document.getElementById(id).textContent;
const shown = document.getElementById("view");
try {
  const packed = Uint8Array.from(atob(text("messages")), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const traits = { static: true, closed: true, keyframe: null, info: JSON.parse(text("info")) };
  const heard = new Map();
  const model = {
    get: (name) => traits[name], set() {}, save_changes() {}, send() {},
    on: (name, call) => heard.set(name, [...(heard.get(name) ?? []), call]),
    off: (name, call) => heard.set(name, (heard.get(name) ?? []).filter((other) => other !== call)),
  };
  const source = new Blob([JSON.parse(text("module"))], { type: "text/javascript" });
  const { initialize, render } = (await import(URL.createObjectURL(source))).default;
  await initialize({ model });
  await render({ model, el: shown });
  for (let at = 0; at < bytes.byteLength; ) {
    const size = new DataView(bytes, at, 4).getUint32(0, true);
    for (const call of heard.get("msg:custom") ?? []) call({ t: "b" }, [new DataView(bytes, at + 4, size)]);
    at += 4 + size;
  }
} catch (error) {
  shown.textContent = `This recording cannot be shown here: ${error}`;
}
"""


def page(messages: Iterable[bytes], info: Mapping[str, object], title: str) -> str:
    """The file's text. messages: of wire.py, beginning with a keyframe. info: what the view's header says."""
    packed = zlib.compress(b"".join(struct.pack("<I", len(message)) + message for message in messages), 9)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<main id="view"></main>\n{_data("info", dict(info))}\n{_data("module", module())}\n'
        f'<script type="text/plain" id="messages">{base64.b64encode(packed).decode()}</script>\n'
        f'<script type="module">{BOOT}</script>\n</body>\n</html>\n'
    )


def _data(name: str, value: object) -> str:
    """JSON in which no character can end the element it stands in."""
    text = json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{text}</script>'
