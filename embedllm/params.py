"""How a request wants its tokens chosen, and when to stop.

Owns SamplingParams: validated once, immutable, with vLLM's names. Knows no tokenizer: ids are checked against the
model's limits by `check_fits`, at submit. Invariant: a SamplingParams that exists is internally consistent.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from embedllm.errors import InvalidRequest, UnknownOption
from embedllm.structured_output import StructuredOutput

MAX_SAMPLES = 128
MAX_LOGPROBS = 32
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1_024
MAX_IDS = 4_096  # logit_bias entries, stop_token_ids, bad_words
MAX_INT = 2**63 - 1

LogitsProcessor = Callable[[list[int], list[int], Any], Any]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request. Fields left out come from the LLM, then the model's generation_config.

    n: samples per prompt, 1..128, sharing the prompt's KV blocks.
    temperature: 0 is greedy, the default unless generation_config says do_sample; otherwise logits are divided by it.
    top_p, top_k, min_p: nucleus mass in (0, 1]; number of candidates, 0 = all; floor relative to the best, in [0, 1].
    presence_penalty, frequency_penalty: subtracted once / per occurrence in the output, in [-2, 2].
    repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen in prompt or output.
    seed: 0..2**63-1; the same seed gives the same tokens whatever else runs. None: drawn from the LLM's own.
    stop: strings (or one) that end the text; matched on text, across token boundaries.
    stop_token_ids: ids that end the sample, beside the model's EOS ids.
    include_stop_str_in_output: keep the stop string in the text.
    ignore_eos: go on past EOS.
    max_tokens: default 256; None = as many as fit.
    min_tokens: EOS and stop ids cannot be chosen before this many.
    logprobs, prompt_logprobs: candidates per token to report, 0 = the chosen one only; at most 32.
    logit_bias: {token id: added to its logit}, each in [-100, 100] or -inf.
    allowed_token_ids: only these can be chosen.
    bad_words: strings whose tokens never appear in sequence.
    skip_special_tokens, spaces_between_special_tokens: how tokens become text.
    cache_salt: prefix-cache entries are shared only between requests with the same salt.
    priority: lower runs first. deadline: seconds from submit, then the request fails.
    logits_processor(prompt_ids, output_ids, logits): trusted code, called each token with a 1-D float32 CPU tensor;
        returns the tensor to sample from.
    structured: the shape of the answer, a StructuredOutput or a dict of its fields. EOS comes where the shape may end.

    Raises InvalidRequest for a value out of range, UnknownOption for a name that does not exist.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 256
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    cache_salt: str | None = None
    priority: int = 0
    deadline: float | None = None
    logits_processor: LogitsProcessor | None = None
    structured: StructuredOutput | Mapping[str, Any] | None = None

    def __new__(cls, **given: Any) -> SamplingParams:
        for name in given:
            if name not in cls.__dataclass_fields__:
                raise UnknownOption.named(name, cls.__dataclass_fields__, "SamplingParams")
        self = object.__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def __post_init__(self) -> None:
        for name in self.given:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _integer("n", self.n, 1, MAX_SAMPLES)
        _integer("top_k", self.top_k, -1, MAX_INT)
        _integer("min_tokens", self.min_tokens, 0, MAX_INT)
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        _integer("seed", self.seed, 0, MAX_INT, optional=True)
        _integer("max_tokens", self.max_tokens, 1, MAX_INT, optional=True)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if self.deadline is not None:
            _number("deadline", self.deadline, 0.0, 1e9, above=True)
        for f in fields(self):
            if f.type == "bool" and not isinstance(getattr(self, f.name), bool):
                raise InvalidRequest(f"{f.name} must be True or False, got {getattr(self, f.name)!r}")
        self._normalise()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        check_salt(self.cache_salt)
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise InvalidRequest(f"logits_processor must be callable, got {self.logits_processor!r}")
        if self.structured is not None:
            object.__setattr__(self, "structured", StructuredOutput.of(self.structured))
            if self.ignore_eos:
                raise InvalidRequest(
                    "ignore_eos and structured exclude each other: a shape that is complete ends by EOS"
                )

    def _normalise(self) -> None:
        """Sequences become tuples, mappings become plain dicts: nothing the caller holds can change a live request."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        put = object.__setattr__
        put(self, "top_k", max(self.top_k, 0))
        put(self, "stop", _strings("stop", stop, MAX_STOP_STRINGS))
        put(self, "bad_words", _strings("bad_words", self.bad_words, MAX_IDS))
        put(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids, MAX_IDS))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids, MAX_INT))
            if not self.allowed_token_ids:
                raise InvalidRequest("allowed_token_ids is empty: no token could be chosen; leave it None for all")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidRequest(f"logit_bias must map token ids to floats, got {self.logit_bias!r}")
            ids = _ids("logit_bias", list(self.logit_bias), MAX_IDS)
            for value in self.logit_bias.values():
                if value != -math.inf:
                    _number("logit_bias value", _plain(value), -100.0, 100.0)
            put(self, "logit_bias", dict(zip(ids, map(float, self.logit_bias.values()), strict=True)))

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields the caller set."""
        return self.__dict__["_given"]  # type: ignore[no-any-return]

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with these fields set, the others as they are (unset stays unset)."""
        return SamplingParams(**{name: getattr(self, name) for name in self.given} | changes)

    def resolve(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """A copy where fields nobody set take the model's defaults."""
        missing = {name: value for name, value in defaults.items() if name not in self.given}
        return self.replace(**missing) if missing else self

    def __repr__(self) -> str:
        values = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name in self.given)
        return f"SamplingParams({', '.join(values)})"

    def check_fits(self, vocab_size: int) -> None:
        """Every token id is below the logits width `vocab_size`, else InvalidRequest naming the id."""
        named: list[tuple[str, Sequence[int]]] = [
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logit_bias", tuple(self.logit_bias or ())),
        ]
        for name, ids in named:
            worst = max(ids, default=0)
            if worst >= vocab_size:
                raise InvalidRequest(f"{name} has token id {worst}, but the model's ids end at {vocab_size - 1}")


def check_salt(salt: object) -> None:
    """Raises InvalidRequest unless it is a string or None."""
    if salt is not None and not isinstance(salt, str):
        raise InvalidRequest(f"cache_salt must be a string or None, got {salt!r}")


def _plain(value: Any) -> Any:
    """Other libraries' numbers (numpy's) as Python's; anything else as it is."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real):
        return value
    try:
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    except OverflowError:
        return value


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise InvalidRequest(f"{name} must be a number, got {value!r}")
    if not low <= value <= high or (above and value == low):
        raise InvalidRequest(f"{name}={value!r} is out of range: {'above' if above else 'from'} {low:g} to {high:g}")


def _integer(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer{' or None' if optional else ''}, got {value!r}")
    if not low <= value <= high:
        raise InvalidRequest(f"{name}={value} is out of range: {low} to {high}")


def _strings(name: str, values: object, most: int) -> tuple[str, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InvalidRequest(f"{name} must be a list of strings, got {values!r}")
    if len(values) > most:
        raise InvalidRequest(f"{name} has {len(values)} entries; at most {most}")
    for value in values:
        if not isinstance(value, str) or not value:
            raise InvalidRequest(f"{name} must hold non-empty strings, got {value!r}")
        if len(value) > MAX_STOP_LENGTH:
            raise InvalidRequest(f"{name} has a string of {len(value)} characters; at most {MAX_STOP_LENGTH}")
    return tuple(values)


def _ids(name: str, values: object, most: int) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InvalidRequest(f"{name} must be a list of token ids, got {values!r}")
    if len(values) > most:
        raise InvalidRequest(f"{name} has {len(values)} entries; at most {most}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) < 2**31:
            raise InvalidRequest(f"{name} must hold token ids (integers from 0), got {value!r}")
    return tuple(map(int, values))
