"""What LoRAX's clients ask for, and the same as OpenAI's request of vLLM. Nothing is looked up here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, field_validator, model_validator

from lorakit.errors import LorakitError

GENERATE = frozenset({"/", "/generate", "/generate_stream"})
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MOST_OF = 64  # texts that `best_of` is chosen from

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Source = Literal["local", "hub", "s3", "pbase"]


class Invalid(LorakitError):
    """A request that LoRAX would refuse, or that can't be answered as it would be there."""


class MergedAdapters(BaseModel):
    """Several adapters as one. `density` and `majority_sign_method` are for the methods that have them."""

    ids: list[StrictStr] = Field(min_length=1)
    weights: list[Annotated[float, Field(allow_inf_nan=False)]] | None = None
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None

    @model_validator(mode="after")
    def _as_many(self) -> MergedAdapters:
        if self.weights is not None and len(self.weights) != len(self.ids):
            raise ValueError("`ids` and `weights` have to be of one length")
        return self


class ResponseFormat(BaseModel):
    """JSON; with a schema, as an object or as its text, JSON that it describes."""

    model_config = ConfigDict(populate_by_name=True)
    type: Literal["json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | StrictStr | None, Field(alias="schema")] = None

    @field_validator("schema_")
    @classmethod
    def _read(cls, schema: dict[str, Any] | str | None) -> dict[str, Any] | None:
        try:
            read = json.loads(schema) if isinstance(schema, str) else schema
        except RecursionError:
            raise ValueError("the schema nests too deeply") from None
        if read is not None and not isinstance(read, dict):
            raise ValueError("a JSON schema is an object")
        return read


class Parameters(BaseModel):
    """LoRAX's, with its defaults; what is not among them is passed over, as there. Nobody reads `api_token` here."""

    adapter_id: StrictStr | None = None
    adapter_source: Source | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: Annotated[StrictStr | None, Field(repr=False)] = None
    best_of: Annotated[int, Field(gt=0, le=MOST_OF)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    repetition_penalty: Positive | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    typical_p: Share | None = None
    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: list[Annotated[StrictStr, Field(min_length=1)]] | None = None
    truncate: Count | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Count | None = None
    apply_chat_template: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _together(self) -> Parameters:
        if self.adapter_id and self.merged_adapters is not None:
            raise ValueError("at most one of `adapter_id` and `merged_adapters` may be given")
        if self.best_of_many and not self.samples:
            raise ValueError("with `best_of` > 1, sampling has to be on (`do_sample`)")
        if self.best_of_many and self.seed is not None:
            raise ValueError("with `best_of` > 1 there is no `seed`")
        if self.typical_p is not None:
            raise ValueError("vLLM has no typical decoding: leave `typical_p` out, or use `top_p`")
        if self.watermark:
            raise ValueError("vLLM writes no watermark of this kind: leave `watermark` out")
        return self

    @property
    def best_of_many(self) -> bool:
        return (self.best_of or 1) > 1

    @property
    def samples(self) -> bool:
        """As there: a temperature of 0 or 1 by itself changes nothing."""
        if self.temperature == 0:
            return False
        warped = self.temperature not in (None, 1.0) or self.top_k is not None or self.top_p is not None
        return bool(self.do_sample) or warped

    @property
    def wants_tokens(self) -> bool:
        return bool(self.details or self.decoder_input_details)


class Generate(BaseModel):
    """What `/generate` and `/generate_stream` take; `/` takes `stream` as well."""

    inputs: Annotated[StrictStr, Field(min_length=1)]
    parameters: Parameters = Parameters()
    stream: bool = False

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_given(cls, given: Any) -> Any:
        return {} if given is None else given

    def refuse_in_stream(self) -> None:
        """Raises Invalid where it can't be answered token by token."""
        if self.parameters.best_of_many:
            raise Invalid("`best_of` > 1 can't be streamed")
        if self.parameters.decoder_input_details:
            raise Invalid("`decoder_input_details` can't be streamed")


@dataclass(frozen=True, slots=True)
class Asked:
    """The same, of vLLM: where, and the body."""

    path: str
    body: Mapping[str, Any]


def path_of(request: Generate) -> str:
    """Where it is put."""
    return CHAT if request.parameters.apply_chat_template else COMPLETIONS


def as_openai(request: Generate, model: str, most: int | None, *, stream: bool) -> Asked:
    """The request of vLLM whose answer holds all that is to be told of this one; `most`: the tokens that it may have.

    Every setting that a base may bring defaults of its own for is said: LoRAX reads none of them.
    """
    given = request.parameters
    body: dict[str, Any] = {
        "model": model,
        **_prompt(request),
        "max_tokens": most,
        "temperature": (1.0 if given.temperature is None else given.temperature) if given.samples else 0.0,
        "top_p": given.top_p or 1.0,
        "top_k": given.top_k or 0,
        "min_p": 0.0,
        "repetition_penalty": given.repetition_penalty or 1.0,
        "frequency_penalty": given.frequency_penalty or 0.0,
        "presence_penalty": given.presence_penalty or 0.0,
        "ignore_eos": bool(given.ignore_eos_token),
    }
    if given.stop:
        # which LoRAX counts to the text; and nothing has to be held back from a stream
        body |= {"stop": given.stop, "include_stop_str_in_output": True}
    if given.truncate is not None:
        body |= {"truncate_prompt_tokens": given.truncate, "truncation_side": "left"}
    if given.seed is not None:
        body["seed"] = given.seed
    if given.best_of_many:
        body["n"] = given.best_of
    if given.response_format is not None:
        body["response_format"] = _format(given.response_format)
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    path = path_of(request)
    if stream or given.wants_tokens or given.best_of_many:
        body |= _with_tokens(given, path)
    return Asked(path, body)


def _prompt(request: Generate) -> dict[str, Any]:
    if not request.parameters.apply_chat_template:
        return {"prompt": request.inputs}
    try:
        read = json.loads(request.inputs)
    except (ValueError, RecursionError):
        read = None
    messages = read if isinstance(read, list) and read and all(isinstance(one, dict) for one in read) else None
    return {"messages": messages or [{"role": "user", "content": request.inputs}]}


def _format(asked: ResponseFormat) -> dict[str, Any]:
    if asked.schema_ is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "response", "schema": asked.schema_}}


def _with_tokens(given: Parameters, path: str) -> dict[str, Any]:
    """Ids and logprobs. Where alternatives are told, they come as ids, as several may have one text."""
    alternatives = given.return_k_alternatives
    asked: dict[str, Any] = {"return_token_ids": True}
    if given.decoder_input_details:
        asked["prompt_logprobs"] = 0
    asked |= {"logprobs": True, "top_logprobs": alternatives or 0} if path == CHAT else {"logprobs": alternatives or 0}
    return asked | ({"return_tokens_as_token_ids": True} if alternatives else {})
