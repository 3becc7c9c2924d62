"""The table of families: whose template is whose, and what each must have."""

import itertools

import pytest

from embedllm.chat.families import (
    DEEPSEEK,
    DEEPSEEK_R1,
    FAMILIES,
    GLM,
    GRANITE,
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_LIST,
    PHI,
    QWEN_XML,
    Family,
    family_of,
)
from tests.unit.chat_templates import TEMPLATES

OWNERS = {
    "hermes": HERMES,
    "qwen3": HERMES,
    "smollm3": HERMES,
    "qwen3-coder": QWEN_XML,
    "glm": GLM,
    "llama": LLAMA,
    "mistral-list": MISTRAL_LIST,
    "mistral": MISTRAL,
    "granite": GRANITE,
    "phi": PHI,
    "deepseek-r1": DEEPSEEK_R1,
    "deepseek": DEEPSEEK,
    "harmony": HARMONY,
    "gemma": None,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_shows_its_family(name: str) -> None:
    found, owner = family_of(TEMPLATES[name]), OWNERS[name]
    assert (found and found.name) == (owner and owner.name)


def test_every_family_has_a_template_here() -> None:
    assert {owner.name for owner in OWNERS.values() if owner} == {family.name for family in FAMILIES}
    assert OWNERS.keys() == TEMPLATES.keys()


def test_reasoning_is_what_the_template_has() -> None:
    reasons = {name for name in TEMPLATES if (found := family_of(TEMPLATES[name])) and found.reasoning}
    assert reasons == {"qwen3", "smollm3", "glm", "deepseek-r1", "deepseek", "harmony"}
    magistral = family_of(TEMPLATES["mistral"] + "[THINK][/THINK]")
    assert magistral and magistral.reasoning and magistral.reasoning.open == "[THINK]"


def test_the_model_type_decides_where_the_marker_is_shared() -> None:
    assert family_of("<|tool_call|>") is not None
    for model_type, family in (("phi3", PHI), ("granite", GRANITE), ("", GRANITE), ("llama", GRANITE)):
        found = family_of("<|tool_call|>", model_type)
        assert found and found.name == family.name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_marker_is_the_beginning_of_another(family: Family) -> None:
    reasoning = (family.reasoning.open,) if family.reasoning else ("<think>",)
    for a, b in itertools.permutations((*family.begins, *family.noise, *reasoning), 2):
        assert not a.startswith(b)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_the_grammar_writes_begins_with_a_marker_of_the_parser(family: Family) -> None:
    first = (family.open + family.head) % "name"
    assert first.startswith((*family.begins, *family.noise))
    assert any(begin in first for begin in family.begins)
    assert family.head.count("%s") == 1
