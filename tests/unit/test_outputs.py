"""What a caller gets back: its views in a notebook hold hostile text, and equality is by value."""

import pytest

from embedllm.outputs import Completion, Delta, Logprob, Timing, Usage

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;'


def completion(text: str = "hello", **options: object) -> Completion:
    return Completion(text, [1, 2], "stop", **options)


def test_defaults() -> None:
    c = completion()
    assert str(c) == "hello" and c.outputs == (c,) and c.index == 0
    assert c.usage == Usage(0, 0, 0) and c.timing == Timing() and c.stop_reason is c.logprobs is c.parsed is None


def test_outputs_are_all_samples_in_order() -> None:
    others = (completion("b", index=1), completion("c", index=2))
    c = completion("a", siblings=others)
    assert [output.text for output in c.outputs] == ["a", "b", "c"]
    assert "siblings" not in repr(c)


@pytest.mark.parametrize("view", ["_repr_html_", "_repr_markdown_"])
def test_views_show_every_sample(view: str) -> None:
    c = completion("first", siblings=(completion("second", index=1),))
    assert "first" in getattr(c, view)() and "second" in getattr(c, view)()


def test_html_is_escaped() -> None:
    view = completion(HOSTILE)._repr_html_()
    assert "<script" not in view and "<img" not in view
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in view and "&amp;amp;" in view
    assert "2 tokens · stop" in view


@pytest.mark.parametrize("text", ["", "a", "```", "````\n```", "`" * 9 + "a" + "`" * 12, HOSTILE])
def test_markdown_fence_cannot_be_closed_from_inside(text: str) -> None:
    first, *body, last = completion(text)._repr_markdown_().split("\n")
    assert first == last + "text" and set(last) == {"`"} and len(last) >= 3
    assert "\n".join(body) == text
    assert all(last not in line for line in body)


def test_deltas_are_values() -> None:
    assert Delta(0, "a", [1]) == Delta(0, "a", [1]) != Delta(1, "a", [1])
    assert Delta(0, "a", [1], [[Logprob(1, -0.5, 1)]]).logprobs == [[(1, -0.5, 1)]]
    with pytest.raises(AttributeError):
        Delta(0, "a", [1]).text = "b"
