"""The bodies of replies, as OpenAI's API has them. They only describe the API in /openapi.json."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Bytes = list[Annotated[int, Field(ge=0, le=255)]]


class ErrorFields(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field of the request that is wrong.")
    code: str | None


class Error(BaseModel):
    error: ErrorFields


class ModelReply(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str | None = Field(None, description="What the model does: language, segment, detect, classify or embed.")
    words: bool | None = Field(None, description="Whether a segmenter takes texts.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelReply]


class CachedTokens(BaseModel):
    cached_tokens: int


class ReasoningTokens(BaseModel):
    reasoning_tokens: int


class PromptUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Usage(PromptUsage):
    completion_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: Bytes


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class EmbeddingReply(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or their float32 bytes in base64.")


class EmbeddingList(BaseModel):
    object: Literal["list"]
    model: str
    data: list[EmbeddingReply]
    usage: PromptUsage


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseReply(BaseModel):
    """A response; it repeats fields of the request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage


class ModelHealth(BaseModel):
    state: Literal["unloaded", "loading", "ready", "restarting", "unloading", "failed"]
    open: int = Field(description="The number of sequences that run or wait.")


class Health(BaseModel):
    status: Literal["ok", "unavailable"]
    models: dict[str, ModelHealth]
