"""Define the wire format: request types, OpenAI's error object, the OpenAPI document.

Hides: how a body is parsed, and the error messages for wrong bodies. Refuses to know: models, HTTP
servers, how vectors are made.

Requests are those of OpenAI's embeddings API (platform documentation, "Create embeddings").
Extensions for input types, dtypes and truncation are those of Voyage, Cohere, Jina and TEI.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from gteopt.errors import suggest_names

MAX_INPUTS = 2048
MAX_TOKEN_ID = 2**31 - 1
OutputDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
Truncate = Literal["none", "start", "end"]


class ApiError(Exception):
    """An error that is sent to the client.

    Attributes:
        status: the HTTP status.
        message: text for the user: what was found, what is allowed, what to do.
        param: name of the wrong field, such as `input[3]`.
        code: identifier of the error, for programs.
        retry_after_s: seconds after which to try again; None if that does not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """OpenAI's type of the error."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


Texts = list[str]
TokenLists = list[list[int]]


def parse_input(value: object, *, param: str = "input") -> Texts | TokenLists:
    """Parse the texts or token lists of a request.

    Args:
        value: value of the field: a string, strings, token ids or lists of token ids.
        param: name of the field.

    Raises:
        ApiError: another type, an empty list, an empty item, or more than 2,048 items.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise _wrong(param, f"is {_kind(value)}; send a string, a list of strings, or token ids")
    if not value:
        raise _wrong(param, "is an empty list; send at least one text")
    if all(_is_token(item) for item in value):
        _check_tokens(value, param)
        return [value]
    if len(value) > MAX_INPUTS:
        raise _wrong(
            param, f"has {len(value):,} items, at most {MAX_INPUTS:,} are allowed; split the list"
        )
    kind = type(value[0])
    for i, item in enumerate(value):
        item_param = f"{param}[{i}]"
        if type(item) is not kind or kind not in (str, list):
            raise _wrong(
                item_param,
                f"is {_kind(item)}; all items must be strings, or all lists of token ids",
            )
        if kind is list:
            wrong = next((j for j, token in enumerate(item) if not _is_token(token)), None)
            if wrong is not None:
                raise _wrong(
                    f"{item_param}[{wrong}]", f"is {_kind(item[wrong])}; token ids are integers"
                )
            _check_tokens(item, item_param)
        elif not item:
            raise _wrong(item_param, "is an empty string; leave it out of the list")
    return value


def _is_token(value: object) -> bool:
    return type(value) is int


def _check_tokens(ids: Sequence[int], param: str) -> None:
    if not ids:
        raise _wrong(param, "has no token ids; leave it out of the list")
    if (worst := min(ids)) < 0 or (worst := max(ids)) > MAX_TOKEN_ID:
        raise _wrong(param, f"has {worst}, which is no token id")


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, f"'{param}' {message}.", param=param)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


_TOKEN = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_INPUT = WithJsonSchema(
    {
        "oneOf": [
            {"type": "string", "minLength": 1},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1},
                "minItems": 1,
                "maxItems": MAX_INPUTS,
            },
            {"type": "array", "items": _TOKEN, "minItems": 1},
            {
                "type": "array",
                "items": {
                    "type": "array",
                    "items": _TOKEN,
                    "minItems": 1,
                },
                "minItems": 1,
                "maxItems": MAX_INPUTS,
            },
        ]
    }
)
Input = Annotated[Any, BeforeValidator(parse_input), _INPUT]
_TEXTS = WithJsonSchema(
    {
        "oneOf": [
            {"type": "string", "minLength": 1},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1},
                "minItems": 1,
                "maxItems": MAX_INPUTS,
            },
        ]
    }
)
TextsField = Annotated[Any, _TEXTS]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PromptedRequest(_Request):
    """Fields that choose the prompt. `prompt_name` excludes the other two fields.

    Attributes:
        input_type: `document`, which is the default, or `query`.
        prompt_name: name of a prompt in the model's folder.
        instruction: the purpose of the queries; it sets `input_type` to `query`.
    """

    input_type: Literal["query", "document"] | None = None
    prompt_name: str | None = None
    instruction: str | None = None


class EmbeddingRequest(PromptedRequest):
    """`POST /v1/embeddings`.

    Attributes:
        model: name of a served artifact.
        input: one or several texts, as strings or as token ids.
        dimensions: length of the vectors; the artifact must support it.
        encoding_format: `float` for lists of numbers, `base64` for their little-endian bytes.
        user: ignored.
        output_dtype: number type of the vectors; `embedding_dtype` is the same field.
        truncate: the end at which long texts are cut; `none` makes a long text an error.
        on_error: `null` gives null for a text that fails, and lists its error in `errors`.
        tokenizer: `model` states that token ids are of the served model's own tokenizer.
    """

    model: str
    input: Input
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    output_dtype: OutputDtype | None = None
    embedding_dtype: OutputDtype | None = None
    truncate: Annotated[Truncate, BeforeValidator(_lower)] | None = None
    on_error: Literal["null", "error"] | None = None
    tokenizer: Literal["model"] | None = None


class TokenizeRequest(PromptedRequest):
    """`POST /tokenize`: token ids of texts, with prompt and special tokens."""

    model: str
    input: TextsField


class SimilarityRequest(_Request):
    """`POST /similarity`: cosines of queries and documents."""

    model: str
    queries: TextsField
    documents: TextsField
    instruction: str | None = None


class TeiRequest(_Request):
    """`POST /embed`, for clients of Text Embeddings Inference."""

    inputs: TextsField
    normalize: Literal[True] = True
    truncate: bool = False
    truncation_direction: Annotated[Literal["left", "right"], BeforeValidator(_lower)] = "right"
    prompt_name: str | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class ReloadRequest(_Request):
    """`POST /admin/reload`: one artifact by name, or all of them."""

    model: str | None = None


Kind = TypeVar("Kind", bound=BaseModel)


def parse_body(body: bytes, kind: type[Kind]) -> Kind:
    """Parse the request in a JSON body.

    Raises:
        ApiError: the body is not JSON, or a field is missing, unknown or wrong.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            400, f"the body is not valid JSON in UTF-8: {error}", code="invalid_json"
        ) from error
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is {_kind(content)}; send a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _as_api_error(error, content, kind) from error


def _as_api_error(
    error: ValidationError, content: Mapping[str, Any], kind: type[BaseModel]
) -> ApiError:
    first = error.errors(include_url=False, include_context=True)[0]
    name = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "missing":
        if name == "model":
            return ApiError(400, "you must provide a model parameter", param=name)
        return ApiError(400, f"'{name}' is missing", param=name)
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"Unrecognized request argument supplied: {name} "
            f"({suggest_names(name, kind.model_fields)})",
            param=name,
            code="unknown_parameter",
        )
    value = content.get(name)
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    message = first["msg"].replace("Input should be", "must be")
    return ApiError(400, f"'{name}' {message}; found {shown}", param=name)


def _answer(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_VECTOR = {
    "oneOf": [
        {"type": "array", "items": {"type": "number"}},
        {"type": "string", "format": "byte"},
        {"type": "null"},
    ]
}
_USAGE = {
    "type": "object",
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "truncated_inputs": {"type": "integer"},
    },
    "required": ["prompt_tokens", "total_tokens"],
}
_ANSWERS: dict[str, dict[str, Any]] = {
    "EmbeddingList": {
        "type": "object",
        "required": ["object", "data", "model", "usage"],
        "properties": {
            "object": {"const": "list"},
            "model": {"type": "string"},
            "usage": _USAGE,
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["object", "index", "embedding"],
                    "properties": {
                        "object": {"const": "embedding"},
                        "index": {"type": "integer"},
                        "embedding": _VECTOR,
                    },
                },
            },
            "errors": {"type": "array", "items": {"type": "object"}},
        },
    },
    "TokenLists": {
        "type": "object",
        "required": ["tokens", "max_tokens"],
        "properties": {
            "model": {"type": "string"},
            "tokens": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            "max_tokens": {"type": "integer"},
        },
    },
    "Similarities": {
        "type": "object",
        "required": ["scores", "usage"],
        "properties": {
            "model": {"type": "string"},
            "scores": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
            "usage": _USAGE,
        },
    },
    "Vectors": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    "Anything": {"type": "object"},
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
}
_ERROR_STATUSES = {
    "400": "a field is missing, unknown or wrong",
    "401": "no API key, or an unknown one",
    "404": "no such model or route",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "429": "the queue is full, or a limit of the key is reached; see Retry-After",
    "500": "the model failed",
    "503": "the server is stopping, or its device has failed",
}
_POSTS: dict[str, tuple[str, type[BaseModel], str]] = {
    "/v1/embeddings": ("Embed texts", EmbeddingRequest, "EmbeddingList"),
    "/tokenize": ("Token ids of texts", TokenizeRequest, "TokenLists"),
    "/similarity": ("Cosines of queries and documents", SimilarityRequest, "Similarities"),
    "/embed": ("Embed texts as Text Embeddings Inference does", TeiRequest, "Vectors"),
    "/admin/reload": ("Reload artifacts and swap them in", ReloadRequest, "Anything"),
}
_GETS = {
    "/v1/models": "The served models",
    "/v1/models/{model}": "One served model",
    "/info": "The served artifacts, their quality, and the server's limits",
    "/livez": "Whether the device works",
    "/readyz": "Whether the server gives the right vectors",
}


def openapi(version: str, *, with_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the server."""
    schemas: dict[str, Any] = dict(_ANSWERS)
    errors = {
        status: _answer(description, {"$ref": "#/components/schemas/Error"})
        for status, description in _ERROR_STATUSES.items()
    }
    paths: dict[str, Any] = {}
    for path, (summary, kind, answer) in _POSTS.items():
        schemas[kind.__name__] = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {
                            "schema": {"$ref": f"#/components/schemas/{kind.__name__}"}
                        }
                    },
                },
                "responses": {
                    "200": _answer(summary, {"$ref": f"#/components/schemas/{answer}"}),
                    **errors,
                },
            }
        }
    for path, summary in _GETS.items():
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": path.strip("/").replace("/", "_").replace("{model}", "one"),
            "responses": {
                "200": _answer(summary, {"$ref": "#/components/schemas/Anything"}),
                **errors,
            },
        }
        if "{model}" in path:
            operation["parameters"] = [
                {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        paths[path] = {"get": operation}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "gteopt serve", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document
