"""Whatever a model says, its views hold no tag, attribute, link, image or formula of the model's making."""

import re
import time
from html.parser import HTMLParser

import markdown_it
import mistune
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedllm.safe_markdown import TAGS, fenced, to_html, to_markdown

URL = "https://evil.example/x.png?leak=1"
ATTACKS = [
    "<script>alert(1)</script>",
    f"<img src={URL}>",
    f"<IMG\nSRC='{URL}'\nonerror=alert(1)>",
    f"<a href='{URL}'>x</a>",
    "<b onmouseover=alert(1)>x</b>",
    "<svg/onload=alert(1)>",
    f"<style>body{{background:url({URL})}}</style>",
    f"<iframe src='{URL}'></iframe><base href='{URL}'><meta http-equiv=refresh content=0>",
    "<!-- --><div style='position:fixed'>x</div>",
    "<details open ontoggle=alert(1)>",
    "<![CDATA[<img src=x>]]>",
    "<?php <img src=x> ?>",
    "<!DOCTYPE html><img src=x>",
    "&lt;img src=x&gt; &#60;img src=x&#62; &#x3c;img&#x3e; &amp;lt;img&amp;gt;",
    f"![a]({URL})",
    f"![a][r]\n\n[r]: {URL}",
    f"[![a]({URL})]({URL})",
    f"[a]({URL})",
    f"[a]({URL} 'title')",
    f"[a](<{URL}>)",
    f"[a][b]\n\n[b]: {URL} 'x'",
    f"[b]\n\n[b]:\n{URL}",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt&colon;alert(1))",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "[a](vbscript:x) [a](//evil.example) [a](/files/x) [a](#x)",
    f"<{URL}>",
    "<me@evil.example> me@evil.example mailto:me@evil.example",
    f"{URL} http://evil.example www.evil.example evil.example ftp://evil.example",
    f"*{URL}* **www.evil.example** _evil.example_ (www.evil.example)",
    "[^1]\n\n[^1]: <img src=x>",
    "*[HTML]: <img src=x>",
    "$x^2$ and $y$",
    "$$\nx^2\n$$",
    "costs $5 or $6",
    r"\(x^2\) \[x^2\] \\(x^2\\) \\[x^2\\]",
    r"\begin{align}x\end{align} \href{javascript:alert(1)}{x} \unicode{x}",
    r"\$x\$ `$`x$ $`x`$ ``$``",
    "@@0@@ $a$ @@1@@",
    "*$*x*$* **$x**$ _$_x$",
    "```math\nx^2\n```",
    "```{=html}\n<img src=x>\n```",
    "```\n</code></pre><img src=x>\n```\n<img src=x>",
    "````\n```\n````\n<img src=x>",
    "```\ra\r```\r<img src=x>",
    "```\na\u2028```\u2028<img src=x>\u2424```\u2424<img src=x>",
    "~~~\n```\n<img src=x>\n~~~",
    "~~~ `\n<img src=x>",
    "- ```\n  <img src=x>\n  ```\n<img src=x>",
    "`<img src=x>` ``<img src=x>` `<img src=x>``",
    "`a``b`<img src=x>`c```d``` `e",
    "` ` `` ` `` <img src=x>",
    "**`a`**`b`**`<img src=x>`** `",
    "`a` ``<img src=x>``$x$`b`",
    "\\`<img src=x>\\` \\\\`<img src=x>`",
    "x\\<img src=x> \\&lt;img \\[a](b) \\![a](b)",
    "| a | b |\n|---|---|\n| `x | <img src=x>` | [a](b) |",
    "| a | b |\n|---|---|\n| `\\|` | $x$ \\| <img src=x> |",
    f"| ![a]({URL}) |\n|---|\n| <img src=x> |",
    "a\n<img src=x>\nb",
    "    <img src=x>",
    "\t<img src=x>",
    "> <img src=x>\n> ![a](b)",
    "# <img src=x> [a](b) $x$ #",
    "<img src=x>\n===\n[a](b)\n---",
    "1) <img src=x>\n   - [a](b)\n      * $x$",
    "{{ x }} {% raw %} {: onclick=alert(1)} {onclick=x} :smile: [[toc]] ==m== ^s^ ~d~ ~~s~~",
    "\x00<img\x00 src=x>\x1b[31m\x7f\x85<img src=x>",
    "\u202e<img src=x>\u200b<img src=x>",
    "\uff1cimg src=x\uff1e <\u0131m src=x>",
    "---\ntitle: <img src=x>\n---",
    "a <https://x>b</https://x> <x:y> <http://a b>",
    "***<img src=x>***__[a](b)__*_$x$_*",
    "**[a]**(https://evil.example) [a]**(https://evil.example)** [a\n](https://evil.example)",
    "[a]`x`(https://evil.example) [`a`](https://evil.example)",
    "!\\[a](https://evil.example) &#33;[a](https://evil.example)",
    "![a](x.png)![b](attachment:y.png) <embed src=x><object data=x><video src=x><input type=image src=x>",
]

# Besides those that to_html writes: what renderers make of the Markdown.
RENDERED = TAGS | {"thead", "tbody"}
RENDERERS = {
    "markdown-it": markdown_it.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render,
    "commonmark": markdown_it.MarkdownIt("commonmark").render,
    "mistune": mistune.create_markdown(
        escape=False, plugins=["url", "math", "table", "footnotes", "abbr", "def_list", "strikethrough", "superscript"]
    ),
}


class Seen(HTMLParser):
    """What a page holds: tags, attributes, and the text outside code."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[object] = []
        self.runs: list[str] = [""]  # of text between tags, outside code
        self.others: list[str] = []
        self.text = ""
        self._code = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes
        self.runs.append("")
        self._code += tag == "code"

    def handle_endtag(self, tag: str) -> None:
        self.tags.add(tag)
        self.runs.append("")
        self._code -= tag == "code"

    def handle_data(self, data: str) -> None:
        self.text += data
        if not self._code:
            self.runs[-1] += data

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def assert_harmless(page: str, allowed: frozenset[str] | set[str]) -> None:
    seen = Seen(page)
    assert seen.tags <= allowed and not seen.attributes and not seen.others, page
    for run in seen.runs:
        # A typesetter pairs delimiters within one run of text, and ends at the next element.
        assert not re.search(r"\$.*\S.*\$|\$\$|\\[(\[{]|\\begin", run, re.DOTALL), page


@pytest.mark.parametrize("attack", ATTACKS)
def test_html_is_harmless(attack: str) -> None:
    assert_harmless(to_html(attack), TAGS)


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_markdown_is_harmless_to_every_reader(attack: str, renderer: str) -> None:
    assert_harmless(RENDERERS[renderer](to_markdown(attack)), RENDERED)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_delimiter_of_a_formula_stands_outside_code(attack: str) -> None:
    """Some front ends look for formulas in the source, before any Markdown is read."""
    source = re.sub(r"^(`{3,})\n.*?^\1$", "", to_markdown(attack), flags=re.DOTALL | re.MULTILINE)
    source = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", source)
    assert not re.search(r"[$\\<@`]|https?:|www\.", source)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_lost(attack: str) -> None:
    """What is not rendered is there as text: every letter of the attack is."""

    def letters(text: str) -> str:
        return "".join(re.findall(r"[a-zA-Z0-9<>]", text))

    marked = re.sub(r"(?m)^\s*(?:(`{3,}|~{3,}).*|\d+[.)] )", "", attack.replace("\r", "\n"))  # fences and numbers
    assert sorted(letters(Seen(to_html(attack)).text)) == sorted(letters(marked))


# Pieces of everything that means something to somebody.
MARKS = ["`", "``", "```", "~~~", "*", "**", "_", "__", "#", "- ", "1. ", "> ", "|", "\n|---|\n", "=", "---", "^", ":"]
SPACES = ["\n", "\n\n", " ", "    ", "\t", "\r", "\u2028", "\u2424", "\x0b", "\x0c", "\x85", "\x00", "\u200b"]
LINKS = ["[a](b)", "![a](b)", "[a]: b", "<https://a.b>", "https://a.b", "!", "[", "]", "(", ")", "b.cd", "x@y.zz"]
PAGES = ["<img src=x>", "<script>", "</code>", "<!--", "-->", "<", ">", "&", "&lt;", "&#96;", "&#x60;", "a"]
FORMULAS = ["$", "$$", "\\", "\\(", "\\)", "\\[", "\\begin{x}", "{", "}", "@@0@@"]
PIECES = st.sampled_from(MARKS + SPACES + LINKS + PAGES + FORMULAS)
HOSTILE = st.lists(PIECES, max_size=40).map("".join) | st.text(max_size=60)


@given(HOSTILE)
def test_any_text_is_harmless(text: str) -> None:
    assert_harmless(to_html(text), TAGS)
    written = to_markdown(text)
    for render in RENDERERS.values():
        assert_harmless(render(written), RENDERED)


@given(HOSTILE)
def test_a_fence_is_closed_by_nothing_inside(text: str) -> None:
    first, *body, last = fenced(text).split("\n")
    assert first == last and set(last) == {"`"} and len(last) >= 3
    assert "\n".join(body) == text and last not in text


@given(st.lists(PIECES, max_size=25).map("".join))
def test_both_views_read_the_same(text: str) -> None:
    """The Markdown means what the HTML shows, up to stars: next to punctuation a mark may not count as one."""

    def words(page: str) -> str:
        return re.sub(r"[\s*\ufffd]", "", Seen(page).text)

    if "|" in text:
        return  # a table is a block of code in Markdown
    assert words(RENDERERS["commonmark"](to_markdown(text))) == words(to_html(text))


GOOD = {
    "**bold** *thin* ***both***": "<p><strong>bold</strong> <em>thin</em> <em><strong>both</strong></em></p>",
    "use `x < y`": "<p>use <code>x &lt; y</code></p>",
    "snake_case_name and 2*3*4": "<p>snake_case_name and 2<em>3</em>4</p>",
    "# Title #\ntext": "<h1>Title</h1><p>text</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "1. a\n2. b\n\ntext": "<ol><li>a</li><li>b</li></ol><p>text</p>",
    "1. a\n   - b": "<ol><li>a<ul><li>b</li></ul></li></ol>",
    "1984. A year": "<p>1984. A year</p>",
    "- a\n1. b": "<ul><li>a</li></ul><ol><li>b</li></ol>",
    "```py\nx  = 1\n\ny\n```\nz": "<pre><code>x  = 1\n\ny</code></pre><p>z</p>",
    "   ```\n   a\n     b\n   ```": "<pre><code>a\n  b</code></pre>",
    "```\nstill being written": "<pre><code>still being written</code></pre>",
    "**still being written": "<p>**still being written</p>",
    "a | b\n--|--\n1 | 2": "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
    "a\nb\n\nc": "<p>a b</p><p>c</p>",
    "---": "<hr>",
    "2 * 3 * 4 and * alone": "<p>2 * 3 * 4 and * alone</p>",
    "\\*not thin\\*": "<p>*not thin*</p>",
    "$5 & \\n": "<p><span>$</span>5 &amp; <span>\\</span>n</p>",
    "": "",
}


@pytest.mark.parametrize("text", GOOD)
def test_the_subset(text: str) -> None:
    assert to_html(text) == GOOD[text]


@pytest.mark.parametrize("text", [text for text in GOOD if "|" not in text and "$" not in text])
def test_markdown_renders_to_the_same(text: str) -> None:
    """Up to paragraphs in items, and spaces between blocks."""

    def plain(page: str) -> str:
        return re.sub(r"</?p>|\s|/(?=>)", "", page)

    assert plain(RENDERERS["commonmark"](to_markdown(text))) == plain(to_html(text))


LONG = [
    "*",
    "**a ",
    "_a* ",
    "`",
    "`` ` ",
    "`a`",
    "~",
    "~~~\n",
    "- ",
    "  - a\n",
    "|",
    "|\n|-\n",
    "# ",
    "#",
    " ",
    "\t",
    "\\",
]
LONG += ["$", "a\n", "-", "1. ", "a.bc ", "&"]


@pytest.mark.parametrize("piece", LONG)
def test_time_grows_with_the_text_and_no_faster(piece: str) -> None:
    """Twenty thousand of anything; what backtracks or looks back would take minutes."""
    began = time.thread_time()
    to_html(piece * 20_000 + "`")
    to_markdown(piece * 20_000 + "`")
    assert time.thread_time() - began < 5.0
