"""The bodies of requests, as OpenAI's API has them. A field that isn't here is refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_BIASES = 1024
MAX_TOOLS = 128

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Ids = Annotated[list[int], Field(min_length=1)]
Prompt = str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
"""A text, token ids, or several of either."""

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A JSON object: types are not converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelBody(Body):
    """The fields that every route has. Those without effect on the answer are accepted and not used."""

    model: str = Field(max_length=1000)
    user: str | None = None


class SamplingBody(ModelBody):
    """The fields that every route has that generates text."""

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED)
    ignore_eos: bool | None = Field(None, description="Go on after the token that ends a text.")
    stream: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """The sampling options that were given."""
        names = ("temperature", "top_p", "top_k", "min_p")
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        given = {name: value for name in (*names, *penalties) if (value := getattr(self, name)) is not None}
        return given | ({"top_k": 0} if self.top_k == -1 else {})

    def seed_of(self, choice: int) -> int | None:
        """The seed of one choice of several: each has its own."""
        return None if self.seed is None else (self.seed + choice) % 2**63


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="With include_usage: also in each event.")
    include_obfuscation: Literal[False] | None = None


class JSONSchema(Body):
    """A schema is always enforced, whatever `strict` says."""

    name: Annotated[str, Field(max_length=1000)]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(Body):
    """One of these, as vLLM has them."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = Field(None, description="In llguidance's variant of Lark's notation.")

    def given(self) -> dict[str, Any]:
        """The fields that were given."""
        return self.model_dump(exclude_none=True, by_alias=True)


class GenerationBody(SamplingBody):
    """The fields of both kinds of completions."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | ({"logit_bias": self.logit_bias} if self.logit_bias else {})

    def stops(self) -> list[str]:
        """The strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_options(self) -> StreamOptions | None:
        """How a stream reports the numbers of tokens; None if it doesn't."""
        options = self.stream_options
        return options if options is not None and options.include_usage else None


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: FunctionName
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None


class Function(Body):
    """The parameters are always enforced, whatever `strict` says."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: FunctionName


class ToolChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, description="The former name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class EmbeddingBody(ModelBody):
    """The body of /v1/embeddings; `pooling` is pentad's own."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None


class InputPart(Body):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Body):
    """A message, or an output item of an earlier response."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: None = None

    def text(self) -> str:
        """Its content."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class InputCall(Body):
    """A call of an earlier response."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Body):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]
    id: str | None = None
    status: str | None = None

    def text(self) -> str:
        """Its content."""
        return self.output if isinstance(self.output, str) else "\n".join(part.text for part in self.output)


def _type_of_item(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return "message" if kind is None else str(kind)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")],
    Discriminator(_type_of_item),
]


class FunctionType(Body):
    type: Literal["function"]


class ResponsesTool(Function, FunctionType):
    pass


class ResponsesToolChoice(NamedFunction, FunctionType):
    pass


class ResponsesFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseText(Body):
    format: ResponsesFormat | None = None
    verbosity: None = None


class ResponseBody(SamplingBody):
    """The body of /v1/responses. Responses are not stored."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: ResponseText | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def format(self) -> ResponsesFormat:
        """The form of the text."""
        return ResponsesFormat(type="text") if self.text is None or self.text.format is None else self.text.format
