"""How the families of models write a tool call and their reasoning.

Owns the table, and which family a chat template belongs to. Knows no tokenizer and no messages: what stands here is
read by the parser (`parse.py`) and by the grammar (`constrain.py`). Invariant: what a family's grammar lets a model
write, its parser reads back as the same call.

Sources: the chat templates of the models named below, xgrammar's builtin_structural_tag.py, OpenAI's harmony format.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Style = Literal["json", "named", "qwen_xml", "glm_xml"]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """open and close are around the reasoning. gap: a regular expression for what stands before the answer.

    again: it may come more than once in an answer; else only at the beginning.
    """

    open: str
    close: str
    gap: str
    again: bool = False

    @property
    def texts(self) -> tuple[str, str]:
        return (self.open, self.close)


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write calls.

    begins: each starts a call, or a list of calls. end: ends it; "" where the JSON ends it. style: "json" is an object
    with name and arguments, or a list of them; "named" is a name, `split` and the arguments; the others are XML. heads:
    what a call's body may begin with, where that is known; anything else makes the begin marker plain text. whole:
    calls stand only where the answer begins.

    What a grammar writes: `open`, then `head` with the tool's name for %s, the arguments, `tail`, with `separator`
    between calls, then `close`; `lead` before an answer that is no call. noise: markers that are no text.
    """

    name: str
    begins: tuple[str, ...]
    end: str
    style: Style
    head: str
    tail: str
    separator: str
    open: str = ""
    close: str = ""
    split: str = ""
    lead: str = ""
    heads: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    whole: bool = False
    reasoning: Reasoning | None = None
    marks: tuple[str, ...] = field(default=(), repr=False)  # all of them stand in the templates of this family

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that is written around names and arguments."""
        own = (*self.begins, *self.noise, self.end, self.open, self.head, self.tail, self.separator, self.close)
        return (*own, self.split, self.lead, *(self.reasoning.texts if self.reasoning else ()))


_JSON_HEAD = '{"name": "%s", "arguments": '
_THINK = Reasoning("<think>", "</think>", r"\n{0,2}")
_BRACKET_THINK = Reasoning("[THINK]", "[/THINK]", r"\n{0,2}")

# Qwen 2, 2.5, 3; Hermes 2 and 3; SmolLM 3; Granite 4; and every model whose template knows no tools.
HERMES = Family(
    "hermes",
    begins=("<tool_call>",),
    end="</tool_call>",
    style="json",
    heads=("{",),
    head="<tool_call>\n" + _JSON_HEAD,
    tail="}\n</tool_call>",
    separator="\n",
    marks=("<tool_call>",),
)
# Qwen3-Coder, Qwen 3.5.
QWEN_XML = Family(
    "qwen_xml",
    begins=("<tool_call>",),
    end="</tool_call>",
    style="qwen_xml",
    heads=("<function=",),
    head="<tool_call>\n<function=%s>\n",
    tail="\n</function>\n</tool_call>",
    separator="\n",
    marks=("<function=", "<parameter="),
)
# GLM 4.5 to 4.7; the last writes no newlines, which the parser takes too.
GLM = Family(
    "glm",
    begins=("<tool_call>",),
    end="</tool_call>",
    style="glm_xml",
    head="<tool_call>%s\n",
    tail="\n</tool_call>",
    separator="\n",
    marks=("<arg_key>", "<tool_call>"),
)
# Llama 3.1 to 3.3: the whole answer is a call; several are apart by a semicolon.
LLAMA = Family(
    "llama",
    begins=("{",),
    end="",
    style="json",
    head='{"name": "%s", "parameters": ',
    tail="}",
    separator="; ",
    noise=("<|python_tag|>",),
    whole=True,
    marks=('"parameters": ', "<|start_header_id|>"),
)
# Mistral 7B v0.3, Nemo, Mixtral 8x22B v0.3, Small 3.1.
MISTRAL_LIST = Family(
    "mistral_list",
    begins=("[TOOL_CALLS]",),
    end="",
    style="json",
    heads=("[", "{"),
    open="[TOOL_CALLS] [",
    head=_JSON_HEAD,
    tail="}",
    separator=", ",
    close="]",
    marks=("[TOOL_CALLS]",),
)
# Mistral Small 3.2 and later, Devstral, Magistral.
MISTRAL = Family(
    "mistral",
    begins=("[TOOL_CALLS]",),
    end="",
    style="named",
    split="[ARGS]",
    head="[TOOL_CALLS]%s[ARGS]",
    tail="",
    separator="",
    marks=("[TOOL_CALLS]", "[ARGS]"),
)
# Granite 3.
GRANITE = Family(
    "granite",
    begins=("<|tool_call|>",),
    end="",
    style="json",
    heads=("[", "{"),
    open="<|tool_call|>[",
    head=_JSON_HEAD,
    tail="}",
    separator=", ",
    close="]",
    marks=("<|tool_call|>",),
)
# Phi-4-mini.
PHI = Family(
    "phi",
    begins=("<|tool_call|>",),
    end="<|/tool_call|>",
    style="json",
    heads=("[", "{"),
    open="<|tool_call|>[",
    head=_JSON_HEAD,
    tail="}",
    separator=", ",
    close="]<|/tool_call|>",
    marks=("<|tool|>", "<|/tool|>"),
)
# DeepSeek's markers have a fullwidth bar and a lower block in them.
_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
_CALL_BEGIN, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"  # noqa: RUF001
# DeepSeek V3, R1.
DEEPSEEK_R1 = Family(
    "deepseek_r1",
    begins=(f"{_CALL_BEGIN}function{_SEP}",),
    end=_CALL_END,
    style="named",
    split="\n```json\n",
    open=_CALLS_BEGIN,
    head=f"{_CALL_BEGIN}function{_SEP}%s\n```json\n",
    tail=f"\n```{_CALL_END}",
    separator="\n",
    close=_CALLS_END,
    noise=(_CALLS_BEGIN, _CALLS_END),
    marks=(_CALL_BEGIN, "```json"),
)
# DeepSeek V3.1.
DEEPSEEK = Family(
    "deepseek",
    begins=(_CALL_BEGIN,),
    end=_CALL_END,
    style="named",
    split=_SEP,
    open=_CALLS_BEGIN,
    head=f"{_CALL_BEGIN}%s{_SEP}",
    tail=_CALL_END,
    separator="",
    close=_CALLS_END,
    noise=(_CALLS_BEGIN, _CALLS_END),
    marks=(_CALL_BEGIN,),
)
# gpt-oss. Its <|call|> and <|return|> end an answer, so they are EOS and no text.
HARMONY = Family(
    "harmony",
    begins=("<|channel|>commentary to=functions.", "<|channel|>analysis to=functions.", " to=functions."),
    end="<|call|>",
    style="named",
    split="<|message|>",
    head="<|channel|>commentary to=functions.%s <|constrain|>json<|message|>",
    tail="",
    separator="<|start|>assistant",
    lead="<|channel|>final<|message|>",
    noise=(
        "<|start|>assistant",
        "<|channel|>final<|message|>",
        "<|channel|>commentary<|message|>",
        "<|message|>",
        "<|end|>",
        "<|return|>",
    ),
    reasoning=Reasoning("<|channel|>analysis<|message|>", "<|end|>", r"<\|start\|>assistant", again=True),
    marks=("<|channel|>", "<|message|>"),
)
FAMILIES = (HARMONY, DEEPSEEK_R1, DEEPSEEK, PHI, MISTRAL, MISTRAL_LIST, GLM, QWEN_XML, GRANITE, HERMES, LLAMA)
_MODEL_TYPES = {"phi3": PHI, "granite": GRANITE, "granitemoe": GRANITE}  # both write <|tool_call|>


def family_of(source: str, model_type: str = "") -> Family | None:
    """The family whose markers stand in a chat template's source; None if none do: then it writes no calls.

    model_type: the config's, which decides between families that share a marker. The family's reasoning is what the
    template writes around it: a model without such markers does not reason.
    """
    found = next((family for family in FAMILIES if all(mark in source for mark in family.marks)), None)
    if found in (PHI, GRANITE):
        found = _MODEL_TYPES.get(model_type, found)
    return found and replace(found, reasoning=found.reasoning or reasoning_of(source))


def writer_of(source: str, model_type: str = "") -> Family:
    """The family that tools are offered in: the template's own, or hermes where it has none."""
    return family_of(source, model_type) or replace(HERMES, reasoning=reasoning_of(source))


def reasoning_of(source: str) -> Reasoning | None:
    """The markers that a template's source has for reasoning."""
    return next((each for each in (_THINK, _BRACKET_THINK) if each.close in source or each.open in source), None)
